"""`python -m nvfp4lab.cli`, where the `nvfp4lab` script is not on the path.

Nothing else belongs here.
"""

import sys

from nvfp4lab.cli import main

sys.exit(main())
