"""From a benchmark's cases to images."""

from focusdpo_lib.generation.images import IMAGES, generate, image_name, image_seed
