"""Pages without script: one style, by day and by night, on a desk and on a phone.

A page is a template that extends `base.html`. Everything that came from data is escaped; plots,
which are our own SVG, are passed through `plots`.
"""

import re
from collections.abc import Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from smbfast.reporting.drawing import themed


def rendered(template: str, **values: Any) -> str:
    """Return the page of a template of `smbfast/reporting/templates`.

    Raises:
        jinja2.UndefinedError: the template names a value that was not given.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("smbfast.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(values)
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", " ", page)


def plots(svgs: Sequence[str | None] | None) -> list[Markup]:
    """Return the plots that there are, in the colours of the page."""
    return [Markup(themed(svg)) for svg in svgs or () if svg]
