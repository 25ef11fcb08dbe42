"""How tests are ordered and spread over processes; what they share is made in tiny_fixtures."""

import gc
import os

# These files take longest: of several workers each begins with one, and short ones are left for the end.
LONG = (
    "batch_reproduce",
    "notebooks",
    "workers",
    "training_launch",
    "bench_count",
    "paper_profile",
    "bench",
    "comparison",
    "engine_slurm",
    "both_families",
    "evaluation_agreement",
    "mask_errors",
    "training_loop",
    "toybox_encoders",
    "stages",
    "backbone_flux_uno",
    "dip",
)


def pytest_collection_modifyitems(items):
    place = {f"test_{name}": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


def pytest_collection_finish():
    """What has been imported stays: the collector would look through it again and again, for a tenth of the time."""
    gc.freeze()
    gc.enable()
    gc.set_threshold(20_000, 20, 20)


def pytest_addoption(parser):
    what = "computes as if the processor had bfloat16 arithmetic of its own, or had none (in this process alone)"
    parser.addoption("--bfloat16", choices=["yes", "no"], help=what)


def pytest_configure(config):
    """Of several processes the first runs no test: it need not spend the seconds that torch and diffusers take."""
    if config.getoption("tx", None) and "PYTEST_XDIST_WORKER" not in os.environ:
        return
    gc.disable()  # until all is imported; see below
    config.pluginmanager.import_plugin("tiny_fixtures")
    if (chosen := config.getoption("--bfloat16")) is not None:
        from focusdpo_lib.backbones import family

        family.computes_in_bfloat16 = lambda device: chosen == "yes"
