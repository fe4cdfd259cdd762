"""How often each text has been looked at: kept at the data owner, whatever happens to processes and rounds.

A look is a fresh draw of noise on a text's states. Where these are nearly the same, the noise of `k` looks is worth
that of one divided by `sqrt(k)`, so an observer with unlimited looks averages it away. Equal states carry the draw of
before, and are no further look. But weights that are moved by a hair, a new process (a new secret) or a dropout of one
in a million give fresh draws, and there is no line between those and a training's own steps. So looks are counted.
"""

import contextlib
import hashlib
import os
import secrets
import sqlite3
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from fedsea.errors import LimitExceededError, UsageError

_TABLES = """
CREATE TABLE IF NOT EXISTS secret (key BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS looks (text BLOB PRIMARY KEY, count INTEGER NOT NULL, last BLOB NOT NULL) WITHOUT ROWID;
"""


class LookLedger:
    """Counts looks by text in a file of its owner's, and refuses those beyond a number.

    The file holds keyed digests of texts, no text. What is counted is on disk before the states leave; several
    processes may use one file.

    Parameters
    ----------
    path
        Of the file; made, for its owner's eyes only, when there is something to count.
    most
        Looks at a text that are allowed in all; 0 to count only. A negative number raises UsageError.
    """

    def __init__(self, path: str | Path, most: int) -> None:
        if most < 0:
            raise UsageError(f"the budget of looks must be 0 or more; got {most}")
        # One file wherever the process goes; and no name that SQLite would take for another thing, as :memory:.
        self.path, self.most = Path(path).absolute(), most

    def charge(self, looks: Iterable[tuple[Sequence[int], bytes]]) -> None:
        """Count looks that are about to be given: all of them or, where one is refused, none.

        Parameters
        ----------
        looks
            Of each text its tokens, and which draw it carries: one that it carried last is no further look.

        Raises
        ------
        LimitExceededError
            If a text was looked at as often as is allowed.
        UsageError
            If the file cannot be read or written: nothing may leave that is not counted.
        """
        with self._open() as database:
            database.execute("BEGIN IMMEDIATE")
            key = self._key(database)
            for tokens, draw in looks:
                text = hashlib.blake2b(_bytes(tokens), key=key, digest_size=16).digest()
                found = database.execute("SELECT count, last FROM looks WHERE text = ?", (text,)).fetchone()
                count, last = found if found is not None else (0, b"")
                if last == draw:
                    continue
                if self.most and count >= self.most:
                    database.execute("ROLLBACK")
                    raise LimitExceededError(
                        f"the budget of looks is used up: a text has left under fresh noise {count} times, and another "
                        "time would help to average the noise away; stop here, or allow more (--max-looks)"
                    )
                database.execute("INSERT OR REPLACE INTO looks VALUES (?, ?, ?)", (text, count + 1, draw))
            database.execute("COMMIT")

    def most_seen(self) -> int:
        """Looks at the text that was looked at most, which bounds and epsilon take; UsageError for a spoilt file."""
        if not self.path.exists():
            return 0
        with self._open() as database:
            return int(database.execute("SELECT COALESCE(MAX(count), 0) FROM looks").fetchone()[0])

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        # Anew each time: nothing is held across a fork, in other threads or in copies.
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            if stat.S_IMODE(self.path.stat().st_mode) & 0o077:
                self.path.chmod(0o600)
            with contextlib.closing(sqlite3.connect(self.path, timeout=30, isolation_level=None)) as database:
                database.execute("PRAGMA synchronous = EXTRA")
                database.executescript(_TABLES)
                yield database
        except (OSError, sqlite3.Error) as error:
            raise UsageError(f"looks cannot be counted in {self.path}: {error}") from None

    @staticmethod
    def _key(database: sqlite3.Connection) -> bytes:
        found = database.execute("SELECT key FROM secret").fetchone()
        if found is None:
            found = (secrets.token_bytes(32),)
            database.execute("INSERT INTO secret VALUES (?)", found)
        key: bytes = found[0]
        return key


def _bytes(tokens: Sequence[int]) -> bytes:
    return b"".join(token.to_bytes(4, "little") for token in tokens)
