"""What peers need of this machine, asked before anything is traced or calibrated."""

import os
import shutil
import sys
from importlib.util import find_spec

from hqc.engines.builders import package_version, release
from hqc.errors import RuntimeMissingError

__all__ = ["require_cpp_compiler", "require_openvino"]

OPENVINO_PACKAGES = {"openvino": "2025.2", "nncf": "2.17"}
"""The oldest versions of each: those of the extra `openvino`."""

USUAL_COMPILERS = {"darwin": "clang++", "win32": "cl"}
"""What torch looks for where it is not g++."""


def require_cpp_compiler() -> None:
    """Whether torch.compile finds a C++ compiler: the one that CXX names, else the system's usual one.

    Raises:
        RuntimeMissingError: if there is none.
    """
    named, usual = os.environ.get("CXX"), USUAL_COMPILERS.get(sys.platform, "g++")
    if shutil.which(named or usual) is not None:
        return
    do = f"Install {usual}, set CXX, or leave the peer out of --against."
    if not named:
        found = f"{usual} is not there"
    elif len(named.split()) > 1 and shutil.which(named.split()[0]):
        found = f"CXX is `{named}`, which it takes for the name of one program"  # inductor's own reading
        do = "Set CXX to a compiler without options, or leave the peer out of --against."
    else:
        found = f"CXX names {named}, which is not there"
    raise RuntimeMissingError("peer torch-compile", f"torch.compile needs a C++ compiler; {found}", do)


def require_openvino() -> None:
    """Whether OpenVINO and NNCF are there and new enough.

    Raises:
        RuntimeMissingError: naming the package and the extra that installs it.
    """
    for package, oldest in OPENVINO_PACKAGES.items():
        found = package_version(package)
        if found is None or find_spec(package) is None:
            problem = f"{package} is not installed"
        elif release(found) < release(oldest):
            problem = f"{package} {found} is older than {oldest}"
        else:
            continue
        do = "Run `pip install 'hqc[openvino]'`, or leave the peer out of --against."
        raise RuntimeMissingError("peer openvino-int8", problem, do)
