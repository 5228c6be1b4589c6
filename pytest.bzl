# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""A `py_test` that runs its file under pytest, as `test.sh` does."""

load("@rules_python//python:defs.bzl", _py_test = "py_test")

def py_test(name, srcs, deps, data = []):
    _py_test(
        name = name,
        timeout = "long",
        srcs = srcs + ["tests/run_pytest.py"],
        args = srcs,
        data = data + ["setup.cfg"],
        # pytest takes a folder with an __init__.py for a package.
        legacy_create_init = 0,
        main = "tests/run_pytest.py",
        deps = deps,
    )
