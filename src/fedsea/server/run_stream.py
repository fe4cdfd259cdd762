"""A run's stream: OPEN, then operations until CLOSE, an error, or the loss of the connection."""

import logging
from functools import partial

from fedsea.errors import FedSEAError, ProtocolError
from fedsea.server.ledger import Pool
from fedsea.server.pipeline import Pipeline
from fedsea.server.runs import Run
from fedsea.server.served_stream import ServedStream
from fedsea.server.server_round import ServerRound
from fedsea.server.state import ServerState
from fedsea.server.stream import Stream
from fedsea.wire.codec import encode
from fedsea.wire.frames import Kind, Message, Operation
from fedsea.wire.runs import Attach, Attached

log = logging.getLogger("fedsea.server")


class RunStream(ServedStream[Run]):
    """A call with a run, which stays at the server whatever becomes of its stream, but for CLOSE."""

    kind = "run"

    def __init__(self, state: ServerState, stream: Stream) -> None:
        super().__init__(state, stream, state.runs)

    async def serve(self) -> None:
        request = await self.open_request(Attach.from_body)
        if request is None:
            return
        run, a_round = await self.open(request)
        async with Pipeline(
            self.stream,
            received=request.received,
            room=partial(self.state.ledger.room, Pool.BUFFERS, self.stream.client),
            knows=run.trainer.knows,
            count=run.count,
        ) as frames:
            for number, answer in list(run.replies.items()):
                if number > request.received and answer is not None:
                    await frames.write(number, answer)
            while (frame := await frames.read()) is not None:
                if self.stream.reason is not None:
                    raise self.stream.reason  # another stream has the run now, and does what is to be done
                if isinstance(frame, Message) and frame.kind is Kind.CLOSE:
                    self.state.runs.close(run)
                    log.info("run ended run=%s client=%s reason=closed", run.name, run.client)
                    return
                if not isinstance(frame, Operation):
                    raise ProtocolError("an operation or CLOSE was expected")
                self.state.runs.admit(run, frame)
                if a_round is not None:
                    answer = await a_round.do(run, frame)
                else:
                    answer = await self.state.scheduler.run(run.owner, self.state.runs.do, run, frame)
                await frames.write(frame.number, answer)
                del frame, answer  # a frame is long, and the next one may be long in coming
        self.lose()

    async def open(self, request: Attach) -> tuple[Run, ServerRound | None]:
        """The run that the client asks for, with OPENED sent, and the round that it belongs to, if any."""
        state, client = self.state, self.stream.client
        table = state.runs if request.token is None else state.rounds
        run, new = table.attach(request, client, self.stream.end)
        self.lease = run
        state.ledger.keep(self.stream, run.adapter)
        await state.trainer(run)
        log.info("run %s run=%s client=%s", "begun" if new else "taken up", run.name, client)
        a_round, limits = state.rounds.of(run), state.limits
        shared = a_round is not None and a_round.weighs(run)
        attached = Attached(new, run.number, run.version, limits.frame_bytes, limits.run_micro_batches, shared)
        await self.stream.write(encode(Message(Kind.OPENED, attached.to_body())))
        return run, a_round

    def end(self, error: FedSEAError) -> None:
        """The run stays as it was before what is refused."""
        super().end(error)
        self.lose()
