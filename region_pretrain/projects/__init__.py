"""Pre-training methods as packages: ``projects/NAME/name`` is ``region_pretrain.projects.name``.

Every folder under ``projects/`` of a checkout is on this package's path, so a new method only needs
a new folder. An installed wheel contains the packages here.
"""

from region_pretrain.shipped import ROOT

__path__.extend(str(p) for p in sorted((ROOT / "projects").glob("*")) if p.is_dir())
