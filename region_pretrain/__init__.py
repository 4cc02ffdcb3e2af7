"""Region-level self-supervised pre-training of Detectron2 detectors."""

import warnings

__version__ = "0.1.0"

# What Detectron2 0.6 says under today's libraries each time it is imported, and nobody can mend.
warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated", append=True)
warnings.filterwarnings("ignore", message="pkg_resources is deprecated", append=True)
warnings.filterwarnings("ignore", message="torch.meshgrid: in an upcoming release", append=True)
