"""Where compiled functions are kept between processes.

Numba's own index knows the file of the function that is compiled, not what that function calls. So
each version of the sources gets a folder of its own, under NUMBA_CACHE_DIR where that is set, else
under the user's cache folder. Import this before anything is compiled.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Final

import platformdirs
from numba.core import config

_SOURCES: Final = ("collectives", "kernels")


def _checksum() -> int:
    checksum = 0
    for folder in _SOURCES:
        for source in sorted((Path(__file__).parent / folder).rglob("*.py")):
            checksum = zlib.crc32(source.read_bytes(), checksum)
    return checksum


def _folder() -> Path:
    root = os.environ.get("NUMBA_CACHE_DIR") or platformdirs.user_cache_dir("headwise")
    return Path(root) / f"kernels-{_checksum():08x}"


FOLDER: Final = _folder()
config.CACHE_DIR = str(FOLDER)
