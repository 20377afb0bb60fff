"""setuptools' PEP 517 hooks and one thing more: build against the torch that the user already has.

pip builds in a sandbox. Listing torch in ``build-system.requires`` would put a second, usually larger and different
torch there and link against that one. So: when the environment outside the sandbox holds a torch, it is made visible
to the build and nothing is asked for; only when there is none, one is requested.
"""

import functools
import os
import subprocess
import sys
import tempfile

from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403  (the hooks that need no change: sdist and its metadata)

FLOOR = "torch>=2.10"


@functools.cache
def _installed_torch() -> str | None:
    """The site directory, outside pip's sandbox, that holds a torch.

    The sandbox is this interpreter with other variables. Without them it says itself what it sees: its own packages,
    the user's, and in an environment with system packages those of its base, which Debian keeps in places of its own.
    """
    outside = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    ask = "import importlib.util as u; found = u.find_spec('torch'); print(found and found.origin or '')"
    with tempfile.TemporaryDirectory() as empty:  # python -c looks in its working directory first
        said = subprocess.run([sys.executable, "-c", ask], cwd=empty, env=outside, capture_output=True, text=True)
    origin = said.stdout.strip()
    return os.path.dirname(os.path.dirname(origin)) if origin else None


def _expose_torch() -> None:
    site = _installed_torch()
    if site and site not in sys.path:
        sys.path.append(site)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), site]))


def _requirements() -> list[str]:
    return [] if _installed_torch() else [FLOOR]


def get_requires_for_build_wheel(config_settings=None):
    return _requirements()


def get_requires_for_build_editable(config_settings=None):
    return _requirements()


def _with_torch(hook):
    def run(*args, **kwargs):
        _expose_torch()
        return hook(*args, **kwargs)

    return run


prepare_metadata_for_build_wheel = _with_torch(_setuptools.prepare_metadata_for_build_wheel)
prepare_metadata_for_build_editable = _with_torch(_setuptools.prepare_metadata_for_build_editable)
build_wheel = _with_torch(_setuptools.build_wheel)
build_editable = _with_torch(_setuptools.build_editable)
