"""The attacks: one file each, which is called as its attack is. Their names are known without importing them."""

from typing import TYPE_CHECKING

from fedsea.registry import Registry

if TYPE_CHECKING:
    from fedsea.audit.attack import Attack

FLOOR = "prior"
"""The attack that looks at nothing: what can be guessed anyway."""


_ATTACKS: "Registry[Attack]" = Registry("fedsea.audit.attacks", "attack")


def attack_names() -> list[str]:
    """Every attack's name, in the order of the alphabet."""
    return _ATTACKS.names


def attack_class(name: str) -> "type[Attack]":
    """The attack of this name; a UsageError that names all if there is none."""
    return _ATTACKS.find(name)


def get_attack(name: str) -> "Attack":
    """The attack of this name, with its own settings; raises what `attack_class` does."""
    return attack_class(name)()


def usual_attacks(*, training: bool, several: bool) -> tuple[str, ...]:
    """Names of the attacks that fit and are not slow: by whether gradients, or texts several times, are observed."""
    fitting = ["nothing", "sent", "returned", *(["gradient"] if training else []), *(["several"] if several else [])]
    found = [one for one in map(attack_class, attack_names()) if not one.slow and one.reads in fitting]
    return tuple(one.name for one in sorted(found, key=lambda one: fitting.index(one.reads)))
