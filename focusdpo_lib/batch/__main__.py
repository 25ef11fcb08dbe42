"""`python -m focusdpo_lib.batch`: see `cli`."""

import sys

from focusdpo_lib.batch.cli import main

sys.exit(main())
