"""Shipped Triton kernels compile for sm_80, sm_90 and sm_100 within `kernels/budgets.json`.

No GPU is needed: the compiler and the disassembler stand in the Triton wheel.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from smbkernels.registry import OPS

from bench import aot, cubin

SAMPLES = "tests.ops.sample_builds"


@pytest.fixture(scope="module")
def shipped() -> aot.Compiled:
    return aot.compile_all(changed=True)


@pytest.fixture(scope="module")
def compiled_samples() -> aot.Compiled:
    """Kernels with known faults."""
    return aot.compile_all([SAMPLES])


@pytest.fixture(scope="module")
def samples(compiled_samples) -> dict[str, dict]:
    """Their reports, by row."""
    return {aot.row_name(r).removeprefix("sample_builds/"): r for r in compiled_samples.reports}


@pytest.mark.slow
def test_no_budget_is_exceeded(shipped):
    found = aot.failures(shipped, aot.read_table())
    assert not found, "\n".join(["", *found, "", aot.printed(shipped)])


@pytest.mark.slow
def test_every_operation_on_triton_has_builds(shipped):
    rows = [*map(aot.row_name, shipped.reports), *shipped.unchanged]
    built = {row.split("/")[0] for row in rows}
    on_triton = [op for op, entry in OPS.items() if any(b.name == "triton" for b in entry.backends)]
    assert on_triton and {op.rstrip("_") for op in on_triton} <= built


def test_the_table_has_rows_of_both_versions_and_the_same_builds():
    table = aot.read_table()
    versions = {version.rpartition(".")[0] for version in table}
    assert {"3.6", "3.9"} <= versions
    assert len({frozenset(rows) for rows in table.values()}) == 1
    assert aot.as_text(table) == aot.TABLE.read_text()


def test_an_excuse_says_something():
    for rows in aot.read_table().values():
        assert all(len(row["excused"]) > 20 for row in rows.values() if "excused" in row)


@pytest.mark.slow
@pytest.mark.parametrize("arch", cubin.ARCHS)
def test_faults_of_real_kernels_are_seen(samples, arch):
    def broken(name: str) -> str:
        return "; ".join(aot.broken_rules(samples[f"{name} sm_{arch}"]))

    assert broken("good") == ""
    assert broken("matrix") == ""
    assert samples[f"matrix sm_{arch}"]["matrix"].keys() == {aot.MATRIX[arch]}
    assert broken("narrow").startswith("no 16-byte load, 8 narrower ones")
    assert "spills" in broken("spills")
    assert "signature must name ['out_ptr', 'x_ptr', 'n', 'BLOCK']" in broken("misnamed")


REPORT = {
    "build": "op/bf16",
    "arch": 90,
    "expects_wide_loads": True,
    "expects_tensor_cores": True,
    "registers": 128,
    "spill_bytes": 0,
    "spill_moves": 0,
    "shared": 65536,
    "tensor_memory": 0,
    "wide_loads": 8,
    "narrow_loads": 2,
    "wide_stores": 4,
    "narrow_stores": 0,
    "matrix": {"HGMMA": 16},
    "source": "0123456789ab",
    "seconds": 0.5,
}


def failures(report: dict, table: dict | None = None, version: str = "3.9.0") -> list[str]:
    table = {"3.9.0": {"op/bf16 sm_90": aot.row_of(REPORT)}} if table is None else table
    return aot.failures(aot.Compiled(version, [], [report]), table)


def test_a_report_within_its_row_passes():
    assert failures(REPORT) == []
    assert failures({**REPORT, "registers": 100, "shared": 0, "wide_loads": 9}) == []
    assert failures(REPORT, version="3.10.0") == []


@pytest.mark.parametrize(
    "change, said",
    [
        ({"registers": 129}, "registers 129 is above 128"),
        ({"spill_bytes": 8, "spill_moves": 2}, "spill_bytes 8 is above 0"),
        ({"spill_moves": 1}, "spill_moves 1 is above 0"),
        ({"shared": 65537}, "shared 65537 is above 65536"),
        ({"tensor_memory": 1}, "tensor_memory 1 is above 0"),
        ({"wide_loads": 7}, "wide_loads 7 is below 8"),
        ({"wide_stores": 3}, "wide_stores 3 is below 4"),
        ({"matrix": {"HMMA": 256}}, "matrix instructions are ['HMMA'], not ['HGMMA']"),
        ({"matrix": {"HGMMA": 16, "HMMA": 1}}, "matrix instructions are ['HGMMA', 'HMMA']"),
        ({"build": "op/other"}, "op/other sm_90: a build without a row"),
        ({"build": "op/other"}, "op/bf16 sm_90: a row without a build"),
        ({"error": "PTXASError"}, "does not compile: PTXASError"),
    ],
)
def test_each_figure_beyond_its_row_fails(change, said):
    assert any(said in line for line in failures({**REPORT, **change}))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"spill_bytes": 8, "spill_moves": 2}, "spills 8 bytes in 2 moves"),
        ({"spill_moves": 1}, "spills 0 bytes in 1 moves"),
        ({"shared": 227 * 1024 + 1}, "shared memory 232449 is above 232448"),
        ({"arch": 80, "matrix": {"HMMA": 1}, "shared": 200 * 1024}, "is above 166912"),
        ({"tensor_memory": 513}, "tensor memory 513 is above 512"),
        ({"wide_loads": 0}, "no 16-byte load, 2 narrower ones"),
        ({"matrix": {"HMMA": 256}}, "no HGMMA, found ['HMMA']"),
        ({"matrix": {}}, "no HGMMA, found none"),
        ({"error": "PTXASError"}, "does not compile: PTXASError"),
    ],
)
def test_rules_hold_for_a_version_without_rows(change, said):
    found = failures({**REPORT, **change}, version="3.10.0")
    assert len(found) == 1 and said in found[0]


def test_a_row_that_breaks_a_rule_needs_an_excuse():
    spilling = {**REPORT, "spill_bytes": 16, "spill_moves": 4}
    row = aot.row_of(spilling)
    assert failures(spilling, {"3.9.0": {"op/bf16 sm_90": row}}) == [
        "op/bf16 sm_90: spills 16 bytes in 4 moves"
    ]
    excused = {"3.9.0": {"op/bf16 sm_90": {**row, "excused": "at the end, outside the loop"}}}
    assert failures(spilling, excused) == []
    # an excuse is no licence for more, and goes when it is no longer needed
    assert failures({**spilling, "spill_bytes": 24}, excused)
    rewritten = aot.updated(aot.Compiled("3.9.0", [], [spilling]), excused)
    assert rewritten == excused
    rewritten = aot.updated(aot.Compiled("3.9.0", [], [REPORT]), excused)
    assert rewritten["3.9.0"]["op/bf16 sm_90"] == aot.row_of(REPORT)


def test_writing_keeps_other_versions_and_drops_rows_without_builds():
    table = {"3.6.0": {"op/gone sm_90": aot.row_of(REPORT)}}
    table["3.9.0"] = dict(table["3.6.0"])
    compiled = aot.Compiled("3.9.0", [], [REPORT])
    written = aot.updated(compiled, table)
    assert written["3.6.0"] == table["3.6.0"] and list(written["3.9.0"]) == ["op/bf16 sm_90"]
    assert len(aot.updated(compiled, table, only="op/b")["3.9.0"]) == 2
    assert len(aot.updated(compiled, table, only="op/")["3.9.0"]) == 1
    assert json.loads(aot.as_text(written)) == written
    assert failures(REPORT, written) == []


def test_the_source_of_a_build_is_its_file_and_its_settings(tmp_path, monkeypatch):
    from tests.ops import sample_builds

    one, other, *_ = sample_builds.builds()
    before = cubin.source_of(one)
    assert before == cubin.source_of(one) and before != cubin.source_of(other)
    assert before != cubin.source_of(replace(one, num_warps=one.num_warps * 2))
    assert before == cubin.source_of(replace(one, archs=(90,)))
    edited = tmp_path / "sample_builds.py"
    edited.write_text(Path(sample_builds.__file__).read_text() + "# edited")
    monkeypatch.setattr(cubin.inspect, "getfile", lambda _function: str(edited))
    assert before != cubin.source_of(one)


@pytest.mark.slow
def test_a_row_of_the_same_source_is_not_compiled_again(compiled_samples, monkeypatch, tmp_path):
    good = [r for r in compiled_samples.reports if r["build"].endswith("good")]
    table = aot.updated(replace(compiled_samples, reports=good), {})
    first, *others = map(aot.row_name, good)
    assert others
    table[compiled_samples.triton][first]["source"] = "another"
    monkeypatch.setattr(aot, "TABLE", tmp_path / "budgets.json")
    aot.TABLE.write_text(aot.as_text(table))
    again = aot.compile_all([SAMPLES], only="good", changed=True)
    assert [aot.row_name(r) for r in again.reports] == [first]
    assert sorted(again.unchanged) == sorted(others)
    # neither is missing, and what was compiled again has the figures it had
    assert aot.failures(again, table) == []


def test_reading_the_disassembly():
    found = cubin.read_code(
        """
        /*0000*/               @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;  /* 0x1 */
        /*0010*/                    LDGSTS.E.BYPASS.LTC128B.128 [R1], [R2.64] ;
        /*0020*/               @UP1 LDG.E.LTC128B.64 R4, desc[UR4][R2.64] ;
        /*0030*/                    LDG.E.ENL2.256 R4, R8, desc[UR4][R2.64] ;
        /*0040*/                    UTMALDG.2D [UR8], [UR4] ;
        /*0050*/                    STG.E.U16 desc[UR4][R2.64], R4 ;
        /*10060*/               @P2 STL.64 [R1+0x8], R4 ;
        /*10070*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*10080*/                   LDGDEPBAR ;
        """
    )
    assert found == {
        "spill_moves": 1,
        "wide_loads": 4,
        "narrow_loads": 1,
        "wide_stores": 0,
        "narrow_stores": 1,
        "matrix": {"HGMMA": 1},
    }
    with pytest.raises(ValueError, match="no instruction"):
        cubin.read_code("nvdisasm fatal")


def test_reading_the_resource_usage():
    text = " Function f:\n  REG:146 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[0]:944 TEXTURE:0\n"
    assert cubin.read_usage(text) == {"registers": 146, "spill_bytes": 24}
    with pytest.raises(ValueError, match="no resource usage"):
        cubin.read_usage("cuobjdump fatal")


def test_a_name_that_no_build_has_is_refused_not_within_budget(monkeypatch, capsys):
    def here(command: list[str], **_options) -> subprocess.CompletedProcess[str]:
        assert command[:3] == [sys.executable, "-m", "bench.cubin"]
        cubin.main(command[3:])  # nothing is compiled, so that it need not be a new process
        return subprocess.CompletedProcess(command, 0, capsys.readouterr().out, "")

    monkeypatch.setattr(aot.subprocess, "run", here)
    with pytest.raises(SystemExit, match="`only` must be in the name of a build, got 'nothing'"):
        aot.main(["--only=nothing"])
    assert "within budget" not in capsys.readouterr().out
