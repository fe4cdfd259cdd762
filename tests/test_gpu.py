"""Client and block server on a CUDA device: the same tokens, training and protection as on a CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedsea.checkpoints import load_whole_model
from fedsea.privacy import GaussianNoise, relative_clipped_gaussian
from fedsea.wire.frames import Forward
from tests.conftest import RunningServer, StartServer, connect
from tests.support.comparing import assert_same_adapters
from tests.support.split_training import Batch, adamw, adapted, batch, train, trained, twins

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> RunningServer:
    return start_server(device=DEVICE)


def on_device(texts: Batch) -> Batch:
    return {name: value.to(DEVICE) for name, value in texts.items()}


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_generate_gives_the_whole_model_s_tokens(server: RunningServer, how: dict[str, Any]) -> None:
    whole = load_whole_model("random:tiny", device=DEVICE)
    prompts = torch.randint(3, 256, (3, 40), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with connect(server, device=DEVICE) as split:
        found, right = (one.generate(prompts, max_new_tokens=24, do_sample=False, **how) for one in (split, whole))
    assert found.device.type == DEVICE
    assert torch.equal(found, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_run_and_are_close(serve: StartServer, dtype: torch.dtype) -> None:
    prompts = torch.randint(3, 256, (2, 30), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    right = load_whole_model("random:tiny", device=DEVICE)(prompts).logits
    server = serve(device=DEVICE, dtype=dtype)
    with connect(server, device=DEVICE, dtype=dtype, wire_dtype=str(dtype).removeprefix("torch.")) as split:
        found = split(prompts).logits.float()
    tolerance = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 0.2}[dtype]
    assert float((found - right).detach().abs().mean() / right.detach().abs().mean()) < tolerance


@pytest.mark.parametrize("fused", [False, True])
def test_training_equals_peft_on_the_whole_model(server: RunningServer, tmp_path: Path, fused: bool) -> None:
    data = [on_device(batch(seed)) for seed in range(4)]
    with twins(server, tmp_path, device=DEVICE) as both:
        found, right = (train(one, data, make=lambda them: adamw(them, fused=fused), clip=1.0) for one in both)
        torch.testing.assert_close(torch.tensor(found), torch.tensor(right), rtol=1e-3, atol=1e-4)
        assert_same_adapters(*both, atol=1e-3)


@pytest.mark.parametrize("noise", [GaussianNoise(50.0), relative_clipped_gaussian(0.5, 30.0)], ids=str)
def test_noise_follows_the_state_also_under_a_fused_optimizer(
    server: RunningServer, forwards: list[Forward], noise: Any
) -> None:
    """An equal state carries the noise of before; one that a fused optimizer has moved carries another."""
    with adapted(server, device=DEVICE, noise=noise) as model:
        model.micro_batches = 1
        optimizer = torch.optim.AdamW(trained(model), lr=1e-2, fused=True)
        for step in (False, False, True, False):
            model(**on_device(batch(5))).loss.backward()
            if step:
                optimizer.step()
            optimizer.zero_grad()
    first, again, moved, after = (forward.states.float() for forward in forwards)
    assert torch.equal(first, again)
    assert torch.equal(first, moved)  # the step came after this pass
    spread = float(first.std())
    assert float((after - first).std()) > spread  # two independent draws differ by sqrt(2) of one


def test_a_training_that_ends_early_gives_the_device_s_memory_back(server: RunningServer) -> None:
    def broken_off() -> None:
        with adapted(server, device=DEVICE) as model:
            model(**on_device(batch(6, lengths=[400] * 8)))

    used = []
    for _ in range(4):
        broken_off()
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    assert used[-1] - used[1] < 1 << 20
