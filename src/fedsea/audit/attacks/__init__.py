"""The attacks, by name."""

from fedsea.audit.attack import Attack
from fedsea.audit.attacks.decoder import Decoder, PaperDecoder
from fedsea.audit.attacks.gradient import Gradient
from fedsea.audit.attacks.nearest import Nearest
from fedsea.audit.attacks.optimise import Optimise
from fedsea.audit.attacks.prior import Prior
from fedsea.audit.attacks.read_out import ReadOut
from fedsea.audit.attacks.search import Average, Search
from fedsea.audit.attacks.search_map import SearchMap
from fedsea.errors import UsageError

ATTACKS: dict[str, type[Attack]] = {
    kind.name: kind
    for kind in (Prior, Nearest, Search, Average, SearchMap, ReadOut, Gradient, Optimise, Decoder, PaperDecoder)
}


def get_attack(name: str) -> Attack:
    """The attack of that name, with its own settings.

    Raises
    ------
    UsageError
        If there is none.
    """
    if name not in ATTACKS:
        raise UsageError(f"there is no attack {name!r}; there are: {', '.join(ATTACKS)}")
    return ATTACKS[name]()
