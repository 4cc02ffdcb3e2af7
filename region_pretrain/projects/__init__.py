"""Pre-training methods as packages: ``projects/NAME/name`` is ``region_pretrain.projects.name``.

Every folder under ``projects/`` of a checkout is on this package's path, so a new method only needs
a new folder. An installed wheel contains the packages here.
"""

from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[2] / "projects"
if _CHECKOUT.is_dir():
    __path__.extend(str(p) for p in sorted(_CHECKOUT.iterdir()) if p.is_dir())
