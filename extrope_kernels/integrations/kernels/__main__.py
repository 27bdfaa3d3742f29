"""Write the folder that `kernels` loads.

python -m extrope_kernels.integrations.kernels FOLDER
"""

import argparse
import sys
from pathlib import Path

from ..._build import BuildError
from .export import export

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path)
try:
    for variant in export(parser.parse_args().folder):
        print(variant)
except (BuildError, OSError) as error:
    sys.exit(f"hub: {error}")
