"""Whether a store may be resumed: the differences between its features and the features of a plan."""

from __future__ import annotations

from typing import Any

from dfx.encoders import behaviour_difference, read_behaviour
from dfx.plan import Head, Plan
from dfx.slides import is_same


def differences(stored: dict[str, Any], plan: Plan) -> list[str]:
    """List the differences between the features of a store and the features of a plan; empty if they are the same.

    `stored`: the attributes of the store. For a given module, the measured behaviour decides. The digest of its code,
    which another version of Python changes, decides only if no behaviour is stored (version 0.1), or if a behaviour
    is random.
    """
    planned = plan.fingerprint()
    fingerprint = stored.get("fingerprint")
    fingerprint = fingerprint if isinstance(fingerprint, dict) else {}
    if is_same(fingerprint.get("slide"), plan.slide.identity):
        planned["slide"] = fingerprint["slide"]  # an older version may have written it
    found: list[str] = []
    for head in plan.heads:
        lines, decided = compared(encoder_of(stored, head.name), head, allow_random=plan.options.allow_nondeterministic)
        found += lines
        if (decided or not len(plan.grid)) and not head.encoder.named:
            same = encoder_of(fingerprint, head.name).get("weights_digest")
            encoder_of(planned, head.name)["weights_digest"] = same
    return found + differing(fingerprint, planned)


def compared(stored: dict[str, Any], head: Head, *, allow_random: bool) -> tuple[list[str], bool]:
    """Compare an encoder's behaviour with the stored behaviour: the differences, and whether both are the same."""
    earlier, now = read_behaviour(stored.get("behaviour")), head.behaviour
    if earlier is None or now is None or earlier.shape_yx != now.shape_yx:  # another shape is another fingerprint
        return [], False
    if earlier.deterministic != now.deterministic:
        told = [
            f"{head.name}: its features {'were' if earlier.deterministic else 'were not'} the same in two runs "
            f"when they were stored, and {'are' if now.deterministic else 'are not'} now"
        ]
        return ([] if allow_random else told), False
    if not now.deterministic:
        return [], False
    how = behaviour_difference(earlier, now)
    if not how:
        return [], True
    libraries, here = stored["behaviour"].get("libraries") or {}, now.describe()["libraries"]
    changed = [f"{name} {was} then, {here.get(name)} now" for name, was in libraries.items() if was != here.get(name)]
    return [f"{head.name}: {how}{''.join(f'; {text}' for text in changed)}"], False


def random_encoders(heads: tuple[Head, ...]) -> list[str]:
    """Name the encoders whose features differ from run to run."""
    return [head.name for head in heads if head.behaviour is not None and not head.behaviour.deterministic]


def encoder_of(attributes: dict[str, Any], name: str) -> dict[str, Any]:
    """Give the entry of an encoder in attributes or a fingerprint; an empty mapping if there is no entry."""
    several = attributes.get("encoders")
    found = several.get(name) if isinstance(several, dict) else attributes.get("encoder")
    return found if isinstance(found, dict) else {}


def differing(stored: dict[str, Any], planned: dict[str, Any]) -> list[str]:
    """Name the fields in which two fingerprints differ, with both values."""
    found = []
    for name in [*planned, *sorted(stored.keys() - planned.keys())]:
        old, new = stored.get(name), planned.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += [f"{name} {line}" for line in differing(old, new)]
        elif old != new:
            found.append(f"{name}: stored {short(old)}, asked {short(new)}")
    return found


def short(value: Any) -> str:
    """Give a value for a message; of a digest, its beginning and end."""
    text = str(value)
    return f"{text[:12]}…{text[-4:]}" if len(text) > 30 and isinstance(value, str) else text
