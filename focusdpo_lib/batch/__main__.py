"""`python -m focusdpo_lib.batch`: see `jobs`."""

import sys

from focusdpo_lib.batch.jobs import main

sys.exit(main())
