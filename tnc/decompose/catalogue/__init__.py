"""The published methods as recipes, one file a family: importing this package registers them all.

A row is a name, one line of what it does, its source, the options it takes and the function that builds its
stages. Where a recipe departs from its paper, the summary says so.
"""

from tnc.decompose.catalogue import (  # noqa: F401  they register their rows
    best,
    low_rank,
    networks,
    quantized,
    rotated,
    spine,
    structured,
)
