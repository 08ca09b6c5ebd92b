"""What a stage's method puts before documents: read by the model, never learned, in training rows alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from tutelage.base.errors import UserError
from tutelage.core import randomness
from tutelage.core.graph import Methods, Node
from tutelage.core.stream import Source


def prefixed(name: str, source: Source, *, node: Node, methods: Methods, processor: Any) -> Source:
    """A source as the stage draws it: as it is where no method has the hook. UserError where two have.

    What is written depends on the records, the seed, the stage and the source's name alone, so that any process that
    opens the stage again, or looks into it, finds the same rows.
    """
    owners = methods.having("prefix")
    if not owners:
        return source
    if len(owners) > 1:
        both = " and ".join(method.name() for method in owners)
        raise UserError(f"stages.{node.name}.methods: {both} both write what documents begin with; keep one")
    rng = random.Random(randomness.seed_of(node.seed, node.root, 0, f"prefix|{name}"))

    def write(records: Iterator[dict[str, Any]]) -> Iterator[str]:
        return owners[0].prefix(_drawn_as(name, records), rng=rng)

    return node.graph.modality.prefixed(source, write, processor=processor, length=node.stage.length)


def _drawn_as(name: str, records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each record with `drawn_as`: what rows of a step call its source, which a replayed one's own name is not."""
    for record in records:
        record["drawn_as"] = name
        yield record
