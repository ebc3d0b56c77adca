"""The build backend: setuptools, with the surrounding environment's torch in reach.

pip builds in an environment of its own that holds only what `requires` names. Naming torch there downloads gigabytes
and builds against a torch that is not the one in use; so nothing is named, and this backend finds the site-packages
folder that holds torch from inside the build and appends it to `sys.path`. Only the standard library is imported
before that.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
import sysconfig
from pathlib import Path

_NO_TORCH = (
    "kvcache_ext is built against the torch that is installed, and none was found: install torch first "
    "(https://pytorch.org), then run pip again. With uv, or where torch is installed in an unusual place, add "
    "--no-build-isolation, or set KVCACHE_EXT_SITE to the folder that holds torch."
)


def _version_folder() -> str:
    return f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"


def _uses_system_site(prefix: Path) -> bool:
    config = prefix / "pyvenv.cfg"
    if not config.is_file():
        return True  # not a virtual environment
    lines = (line.partition("=") for line in config.read_text().splitlines())
    return any(key.strip() == "include-system-site-packages" and value.strip() == "true" for key, _, value in lines)


def _site_packages() -> list[Path]:
    """Every folder that the surrounding interpreter may import torch from, the likeliest first."""
    found: list[str] = []
    if override := os.environ.get("KVCACHE_EXT_SITE"):
        found.append(override)
    prefix = Path(sys.prefix)
    base = Path(sys.base_prefix)
    scheme_vars = {"base": str(prefix), "platbase": str(prefix)}
    for kind in ("purelib", "platlib"):
        found.append(sysconfig.get_path(kind, vars=scheme_vars))
    found += [path for path in sys.path if path.endswith("-packages")]
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if home := os.environ.get(variable):
            found.append(str(Path(home) / _version_folder()))
    if _uses_system_site(prefix):
        base_vars = {"base": str(base), "platbase": str(base)}
        for kind in ("purelib", "platlib"):
            found.append(sysconfig.get_path(kind, vars=base_vars))
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        found += [f"/usr/local/lib/python{version}/dist-packages", "/usr/lib/python3/dist-packages"]
        found.append(sysconfig.get_path("purelib", f"{os.name}_user"))
    folders = (Path(path) for path in dict.fromkeys(found))
    return [folder for folder in folders if folder.is_dir()]


def _missing_tools() -> list[str]:
    """setuptools, unless one is there that can build a wheel, by itself or with the wheel package as before 70.1."""
    if importlib.util.find_spec("setuptools") is None:
        return ["setuptools>=70.1"]
    version = tuple(int(number) for number in importlib.metadata.version("setuptools").split(".")[:2])
    return [] if version >= (70, 1) or importlib.util.find_spec("wheel") else ["setuptools>=70.1"]


def _torch_folder() -> Path | None:
    """The folder that `import torch` finds torch in."""
    torch = importlib.util.find_spec("torch")
    return None if torch is None or torch.origin is None else Path(torch.origin).parents[1]


def _reach_torch() -> None:
    if _torch_folder() is None:
        folders = _site_packages()
        folders.sort(key=lambda folder: not (folder / "torch" / "__init__.py").is_file())
        sys.path.extend(str(folder) for folder in folders if str(folder) not in sys.path)
        importlib.invalidate_caches()
    site = _torch_folder()
    if site is None:
        raise SystemExit(_NO_TORCH)
    if _missing_tools():  # torch needs setuptools itself: a virtual environment's older one may hide it
        sys.path.insert(0, str(site))
        importlib.invalidate_caches()
    # Programs, for ninja. With it sources compile side by side, without it one after the other: it is not required, so
    # that the build also works where nothing can be downloaded. (pip's --target puts programs into site/bin.)
    scripts = [Path(sys.prefix) / "bin", site / "bin", site.parent.parent.parent / "bin"]
    entries = os.environ.get("PATH", "").split(os.pathsep)
    os.environ["PATH"] = os.pathsep.join([*entries, *(str(s) for s in scripts if str(s) not in entries)])


def get_requires_for_build_wheel(config_settings=None):  # type: ignore[no-untyped-def]
    _reach_torch()
    return _missing_tools()


get_requires_for_build_editable = get_requires_for_build_wheel


def get_requires_for_build_sdist(config_settings=None):  # type: ignore[no-untyped-def]
    return [] if importlib.util.find_spec("setuptools") else ["setuptools"]


def _setuptools():  # type: ignore[no-untyped-def]
    _reach_torch()
    if _missing_tools():  # nobody asked what is required: without build isolation nobody does
        raise SystemExit("kvcache_ext is built by setuptools 70.1 or newer: pip install --upgrade setuptools")
    from setuptools import build_meta

    return build_meta


def prepare_metadata_for_build_wheel(directory, config_settings=None):  # type: ignore[no-untyped-def]
    return _setuptools().prepare_metadata_for_build_wheel(directory, config_settings)


def prepare_metadata_for_build_editable(directory, config_settings=None):  # type: ignore[no-untyped-def]
    return _setuptools().prepare_metadata_for_build_editable(directory, config_settings)


def build_wheel(directory, config_settings=None, metadata_directory=None):  # type: ignore[no-untyped-def]
    return _setuptools().build_wheel(directory, config_settings, metadata_directory)


def build_editable(directory, config_settings=None, metadata_directory=None):  # type: ignore[no-untyped-def]
    return _setuptools().build_editable(directory, config_settings, metadata_directory)


def build_sdist(directory, config_settings=None):  # type: ignore[no-untyped-def]
    from setuptools import build_meta

    return build_meta.build_sdist(directory, config_settings)
