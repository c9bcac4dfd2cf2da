"""A GPU of which only shapes exist, to count what a step would give a real one to do.

    shim        a small library, loaded before torch, so that autograd runs without a driver
    device      `pretended_gpu()`: torch believes in one H200; tensors on it have no memory
    ledger      `Ledger`: kernels, bytes, products, memory, copies and waits, with file and line
    launches    launches of Triton kernels: checked, and compiled for sm_90 if asked for
    rehearse    `rehearse(module, arguments)`: a script as it would run on a GPU
    trace       `traced(workload)`: a whole training step, extended from few layers to all

`python -m bench.predict` turns counts into milliseconds at assumed rates.
"""
