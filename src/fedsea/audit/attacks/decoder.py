"""`decoder`: a network that has learnt to read states."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fedsea.audit.attack import Attack
from fedsea.audit.knowledge import Knowledge
from fedsea.audit.observation import Observation, Recovery
from fedsea.parts import Rows

STEPS = 150
ROWS, WINDOW = 8, 64  # of a batch: texts, and tokens of each
STRANGE = 0.25  # of the tokens in every second public text: any of the vocabulary, so that all are met
NEGATIVES = 2048
WIDTH, HEADS, LAYERS = 192, 4, 2
LEARNING_RATE = 3e-4  # a larger one spoils the start where there is little noise
SAMPLES = 16  # batches that the start is measured on


class Decoder(Attack):
    """A network from the states of a text up to a token to that token, trained on pairs under the same noise.

    It starts from what needs no training: the token whose typical state (`Candidates.typical`) is likeliest if states
    differ from it as those of public text do (one Gaussian, linear discriminant analysis). A small causal transformer
    learns what to add to a state before it is compared, by a softmax over the batch's tokens and others drawn from the
    vocabulary. Where layers add little to an embedding, as in a real model's first, the start is nearly all of it.

    Half of the pairs are a colluding client's, as the provider saw them, if there is one. The others (all, if there is
    none) the attacker makes: public text through the public weights, with draws of its own.

    `ahead` says which token a state is trained to give: 0 for its own, 1 for the next.
    """

    name = "decoder"
    knows = "pairs of texts and states under the same noise: a colluding client's, and public text with public weights"
    reads = "sent"
    slow = True

    def __init__(self, steps: int = STEPS, ahead: int = 0, learning_rate: float = LEARNING_RATE) -> None:
        self._steps, self._ahead, self._learning_rate = steps, ahead, learning_rate
        self._network: _Network | None = None

    def prepare(self, knowledge: Knowledge) -> None:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            self._network = self._trained(knowledge)

    def read(self, observations: Sequence[Observation], knowledge: Knowledge) -> Recovery:
        if self._network is None:
            self.prepare(knowledge)
        assert self._network is not None
        queries = self._network(observations[0].sent.unsqueeze(0))[0]
        guesses: list[int | None] = []
        for some in queries.split(WINDOW):
            guesses += self._network.logits(some, slice(None)).argmax(-1).tolist()
        return Recovery(tuple([*[None] * self._ahead, *guesses][: len(guesses)]))

    def _trained(self, knowledge: Knowledge) -> "_Network":
        pairs = _pairs(knowledge)
        network = _Network(knowledge, [next(pairs) for _ in range(SAMPLES)])
        optimizer = torch.optim.AdamW(network.parameters(), lr=self._learning_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self._learning_rate, total_steps=self._steps + 1)
        vocabulary = knowledge.vocabulary
        for _ in range(self._steps):
            tokens, states = next(pairs)
            queries = network(states)[:, : WINDOW - self._ahead].flatten(0, 1)
            wanted = tokens[:, self._ahead :].flatten()
            there = wanted >= 0
            some = torch.cat([wanted[there], torch.randint(vocabulary, (min(NEGATIVES, vocabulary),))]).unique()
            logits = network.logits(queries[there], some)
            loss = nn.functional.cross_entropy(logits, torch.searchsorted(some, wanted[there]))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        return network.eval()


class _Network(nn.Module):
    """States to queries, which are compared with a row for each token; samples show how states differ from typical."""

    _mean: Tensor
    _whiten: Tensor
    _table: Tensor
    _squares: Tensor

    def __init__(self, knowledge: Knowledge, samples: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        with torch.no_grad():
            table = knowledge.candidates.typical
            # Not the first position: nothing precedes it, and it is an outlier in most models.
            tokens = torch.cat([tokens[:, 1:].flatten() for tokens, _ in samples])
            states = torch.cat([states[:, 1:].flatten(0, 1) for _, states in samples])[tokens >= 0]
            apart = states - table[tokens[tokens >= 0]]
            spread = apart.T.cov().double()
            spread += torch.eye(len(spread)) * (1e-3 * spread.trace() / len(spread) + 1e-12)
            whiten = torch.linalg.inv(torch.linalg.cholesky(spread)).T.float()
            self.register_buffer("_mean", apart.mean(0))
            self.register_buffer("_whiten", whiten)
            self.register_buffer("_table", table @ whiten)
            self.register_buffer("_squares", self._table.square().sum(1))
        hidden = table.shape[1]
        self.enter = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.leave = nn.Linear(WIDTH, hidden)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)
        self.sharpness = nn.Parameter(torch.zeros(()))

    def forward(self, states: Tensor) -> Tensor:
        """States `[rows, tokens, hidden]` to queries of the same shape."""
        white = (states - self._mean) @ self._whiten
        mask = nn.Transformer.generate_square_subsequent_mask(states.shape[1])
        added: Tensor = self.leave(self.layers(self.enter(white), mask=mask, is_causal=True))
        return white + added

    def logits(self, queries: Tensor, tokens: Tensor | slice) -> Tensor:
        """Of some tokens, `[queries, tokens]`."""
        return (queries @ self._table[tokens].T - self._squares[tokens] / 2) * self.sharpness.exp()


def _pairs(knowledge: Knowledge) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of tokens `[ROWS, WINDOW]`, -1 for none, and states `[ROWS, WINDOW, hidden]` under the noise."""
    own = ROWS // 2 if knowledge.colluder else ROWS
    made = _made(knowledge, own)
    while True:
        tokens, states = next(made)
        if knowledge.colluder:
            theirs = [_colluders(knowledge) for _ in range(ROWS - own)]
            tokens = torch.cat([tokens, torch.stack([one for one, _ in theirs])])
            states = torch.cat([states, torch.stack([one for _, one in theirs])])
        yield tokens, states


def _made(knowledge: Knowledge, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs that the attacker makes; every text begins as all texts do."""
    text, start = knowledge.shared.public_text, torch.tensor(knowledge.start[:WINDOW], dtype=torch.int64)
    vocabulary = knowledge.vocabulary
    places = torch.arange(WINDOW - len(start))
    while True:
        tokens = text[torch.randint(len(text) - WINDOW, (rows, 1)) + places]
        strange = torch.rand(tokens.shape) < STRANGE
        strange[::2] = False
        tokens = torch.where(strange, torch.randint(vocabulary, tokens.shape), tokens)
        tokens = torch.cat([start.expand(rows, -1), tokens], 1)
        yield tokens, _seen(knowledge, tokens)


@torch.no_grad()
def _seen(knowledge: Knowledge, tokens: Tensor) -> Tensor:
    """What would be observed of texts `[rows, tokens]` under draws of the attacker's own, `[rows, tokens, hidden]`."""
    rows = Rows.uniform(len(tokens), 0, tokens.shape[1])
    packed = knowledge.input_blocks(tokens.reshape(-1), rows, None)
    sent = knowledge.noise.apply(packed, lambda: torch.randn(packed.shape)).to(knowledge.wire_dtype)
    return sent.float().view(*tokens.shape, -1)


def _colluders(knowledge: Knowledge) -> tuple[Tensor, Tensor]:
    """One observation of a colluder's text: `WINDOW` tokens of it, or all and -1."""
    subject = knowledge.colluder[int(torch.randint(len(knowledge.colluder), ()))]
    seen = subject.observations[int(torch.randint(len(subject.observations), ()))]
    tokens, states = torch.full((WINDOW,), -1), seen.sent.new_zeros(WINDOW, seen.sent.shape[1])
    count = min(WINDOW, seen.length)
    tokens[:count], states[:count] = torch.tensor(subject.tokens[:count]), seen.sent[:count]
    return tokens, states
