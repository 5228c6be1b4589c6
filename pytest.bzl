# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""A `py_test` that runs its file under pytest, as `test.sh` does."""

def py_test(name, srcs, deps, **kwargs):
    native.py_test(
        name = name,
        srcs = srcs + [":run_pytest"],
        main = "tests/run_pytest.py",
        args = srcs,
        data = ["setup.cfg"],
        deps = deps + [":conftest"],
        **kwargs
    )
