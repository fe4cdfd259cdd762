"""The errors that FedSEA raises: one clear line each, that says what to do.

Every error has a `code`. A block server sends the code and the message to the client that caused the error; the client
raises the same class again, so that both sides speak of one thing.
"""

from typing import ClassVar

BY_CODE: dict[str, type["FedSEAError"]] = {}


class FedSEAError(Exception):
    """Base of all errors that FedSEA raises on purpose. `str(error)` is one line for a person."""

    code: ClassVar[str] = "error"

    def __init_subclass__(cls) -> None:
        if "code" in vars(cls):
            BY_CODE[cls.code] = cls


class UsageError(FedSEAError):
    """A value given by the user cannot be used: an empty prompt, a negative noise, an unknown dtype."""

    code = "usage"


class TermsError(UsageError):
    """A data owner takes part in a federation on other terms; what the message says is for the coordinator."""

    code = "terms"


class ModelNotFoundError(FedSEAError):
    """No model is found under this name, or its files are incomplete."""

    code = "model_not_found"


class ModelMismatchError(FedSEAError):
    """Client and server hold different models or weights."""

    code = "model_mismatch"


class PartitionError(FedSEAError):
    """The partition does not fit the model, or asks for layers that the server does not hold."""

    code = "partition"


class LimitExceededError(FedSEAError):
    """A limit of the server or of the model is reached; the message names it and its value."""

    code = "limit"


class ProtocolError(FedSEAError):
    """A peer sent something that the wire protocol does not allow."""

    code = "protocol"


class CredentialsError(FedSEAError):
    """A certificate is missing, expired, unreadable or of another authority."""

    code = "credentials"


class ServerUnavailableError(FedSEAError):
    """No block server answers at the address, or it went away and did not come back within the bound."""

    code = "unavailable"


class ServerError(FedSEAError):
    """The block server failed at a step through no fault of the client; its log has the cause."""

    code = "server"


class RunLostError(FedSEAError):
    """The block server does not have a run, or has it no longer; its last checkpoint has what is needed."""

    code = "run_lost"


class NonFiniteError(FedSEAError):
    """A loss, a state or a gradient is not finite; the message says where it was seen first, and what to try."""

    code = "non_finite"


class RefusedTicketError(FedSEAError):
    """A ticket for a federated round is unknown, was used already, belongs to another client, or its round is over."""

    code = "ticket"


class StragglerError(FedSEAError):
    """The others of a federated round have gone on without this client; it may come back in the next round."""

    code = "straggler"
