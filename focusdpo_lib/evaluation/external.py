"""The door to `focusdpo_lib.batch.external_row`, by the name under which its command is documented.

python -m focusdpo_lib.evaluation.external FOLDER --layout uno|patchdpo|case --row NAME --params params/…/04_table1.yaml
"""

import runpy

if __name__ == "__main__":  # what the command calls stands floors above this one
    runpy.run_module("focusdpo_lib.batch.external_row", run_name="__main__", alter_sys=True)
