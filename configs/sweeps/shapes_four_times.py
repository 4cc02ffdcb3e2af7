"""AP after four times the pre-training of shapes_long.py: 222,208 images, one seed.

    python tools/sweep.py --config configs/sweeps/shapes_four_times.py --jobs 2

Its rows belong to the figure of ``shapes_lengths.py``.
"""

from .common.shapes_benchmark import benchmark
from .shapes_lengths import LENGTHS, of_length

sweep = benchmark(
    **{
        **LENGTHS,
        "methods": of_length("four_times", 222_208),  # 6,944 steps * 32 images/step
        "seeds": [0],
    }
)
