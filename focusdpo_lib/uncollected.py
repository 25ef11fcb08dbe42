"""Imported first by a process that only others are forked from (`workers.preload`): it collects no garbage.

The collector would look through all that is imported again and again, a fifth of the time that imports take; and a
forked process that did would get pages of its own for what it shares. `workers.forked` turns it on again.
"""

import gc

gc.disable()
