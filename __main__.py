"""`python -m litzoo` is the `litzoo` command."""

import sys

from litzoo.zoo.cli import main

sys.exit(main())
