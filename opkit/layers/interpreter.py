"""Running a module of this opkit under another interpreter, which has the framework."""

from __future__ import annotations

from pathlib import Path

import opkit

# Exactly this opkit is loaded, whatever opkit the interpreter has: both ends of a conversation are
# of one version. The folder it lies in is appended, not put first: packages beside it (pynvml) are
# found where the interpreter has none, and its own torch is not hidden by one that lies there.
_RUN = """
import importlib.util, os, runpy, sys
folder = sys.argv.pop(1)
sys.path.append(folder)
package = os.path.join(folder, "opkit")
spec = importlib.util.spec_from_file_location(
    "opkit", os.path.join(package, "__init__.py"), submodule_search_locations=[package])
sys.modules["opkit"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["opkit"])
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def module_command(python: str, module: str) -> list[str]:
    """The command that runs ``module`` of this opkit; its arguments come after it.

    ``-P``: nothing in the current folder is taken for a package.
    """
    folder = str(Path(opkit.__file__).resolve().parent.parent)
    return [python, "-P", "-c", _RUN, folder, module]
