"""Client and block server on a CUDA device: the same tokens, training and protection as on a CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from fedsea.checkpoints import load_whole_model
from fedsea.privacy import GaussianNoise, relative_clipped_gaussian
from fedsea.wire.frames import Forward
from tests.conftest import RunningServer, connect
from tests.support.split_training import adamw, assert_same_adapters, batch, lora, train

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]


@pytest.fixture(scope="module")
def server(start_server: Callable[..., RunningServer]) -> RunningServer:
    return start_server("random:tiny", device=DEVICE)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_generate_gives_the_whole_model_s_tokens(server: RunningServer, how: dict[str, Any]) -> None:
    whole = load_whole_model("random:tiny", dtype=torch.float32, device=DEVICE)
    prompts = torch.randint(3, 256, (3, 40), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with connect(server, device=DEVICE) as split:
        found, right = (one.generate(prompts, max_new_tokens=24, do_sample=False, **how) for one in (split, whole))
    assert found.device.type == DEVICE
    assert torch.equal(found, right)


def test_other_dtypes_run_and_are_close(start_server: Callable[..., RunningServer], dtype: torch.dtype) -> None:
    prompts = torch.randint(3, 256, (2, 30), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    right = load_whole_model("random:tiny", dtype=torch.float32, device=DEVICE)(prompts).logits
    server = start_server("random:tiny", device=DEVICE, dtype=dtype)
    with connect(server, device=DEVICE, dtype=dtype, wire_dtype=str(dtype).removeprefix("torch.")) as split:
        found = split(prompts).logits.float()
    tolerance = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 0.2}[dtype]
    assert float((found - right).detach().abs().mean() / right.detach().abs().mean()) < tolerance
    server.stop()


@pytest.mark.parametrize("fused", [False, True])
def test_training_equals_peft_on_the_whole_model(server: RunningServer, tmp_path: Path, fused: bool) -> None:
    data = [{name: value.to(DEVICE) for name, value in batch(seed).items()} for seed in range(4)]
    split = connect(server, device=DEVICE)
    split.add_adapter(lora(), seed=1)
    split.train()
    split.save_adapter(tmp_path)
    whole = load_whole_model("random:tiny", dtype=torch.float32, device=DEVICE)
    reference = PeftModel.from_pretrained(whole, str(tmp_path), is_trainable=True).train()

    def make(parameters: Any) -> torch.optim.Optimizer:
        return adamw(parameters, fused=fused)

    found, right = (train(model, data, make=make, clip=1.0) for model in (split, reference))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(right), rtol=1e-3, atol=1e-4)
    assert_same_adapters(split, reference, atol=1e-3)
    split.close()


@pytest.mark.parametrize("noise", [GaussianNoise(50.0), relative_clipped_gaussian(0.5, 30.0)], ids=str)
def test_noise_follows_the_state_also_under_a_fused_optimizer(
    server: RunningServer, forwards: list[Forward], noise: Any
) -> None:
    """An equal state carries the noise of before; one that a fused optimizer has moved carries another."""
    one = {name: value.to(DEVICE) for name, value in batch(5).items()}
    with connect(server, device=DEVICE, noise=noise) as model:
        model.add_adapter(lora(), seed=1)
        model.train()
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2, fused=True)
        for step in (False, False, True, False):
            model(**one).loss.backward()
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
        with connect(server, device=DEVICE) as model:
            model.add_adapter(lora(), seed=1)
            model.train()
            model(**{name: value.to(DEVICE) for name, value in batch(6, lengths=[400] * 8).items()})

    used = []
    for _ in range(4):
        broken_off()
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    assert used[-1] - used[1] < 1 << 20
