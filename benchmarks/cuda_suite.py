"""Entry of the CUDA suite: ``python benchmarks/cuda_suite.py``; see ``benchmarks/cuda/suite.py``."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts this script's folder first on the path, where our `cuda` would hide NVIDIA's `cuda` from torch.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from benchmarks.cuda.suite import main

    main()
