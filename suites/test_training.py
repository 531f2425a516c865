"""Does the stage-2 recipe train the last adapter alone, on top of the others, and save it alone?"""

import pytest


@pytest.fixture(scope="module")
def trained(lora_training_stack, lora_preset, tmp_path_factory):
    """The stack after three steps on its last adapter, and what it was before."""
    from types import SimpleNamespace

    import torch

    from harness.engines import load_engine
    from harness.testing.training import (
        masked_batch,
        prepare_stage_two,
        save_adapter,
        train_steps,
    )

    *frozen, trainable = [adapter.name for adapter in lora_training_stack.adapters]
    with load_engine(lora_training_stack, device="cpu", dtype="float32") as engine:
        rows = [engine.token_ids(prompt) for prompt in lora_preset.prompts[:4]]
        everything = engine.stack.mode("+".join([*frozen, trainable]))
        stacked = engine.logits(rows[:1], everything)[0]
        prepare_stage_two(engine.model, frozen=frozen, trainable=trainable)
        before = {n: p.detach().clone() for n, p in engine.model.named_parameters()}
        engine.model.eval()
        with torch.no_grad():
            forward = engine.model(input_ids=torch.tensor([rows[0]])).logits[0]
        engine.model.train()
        batch = masked_batch([(row, row) for row in rows], pad_token_id=0)
        train_steps(engine.model, [batch] * 3, learning_rate=1e-3)
        after = dict(engine.model.named_parameters())
        moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
        gradients = {name for name, value in after.items() if value.requires_grad}
        folder = save_adapter(engine.model, trainable, tmp_path_factory.mktemp("saved") / "new")
        yield SimpleNamespace(
            trainable=trainable, stacked=stacked, forward=forward, moved=moved,
            gradients=gradients, folder=folder,
        )  # fmt: skip


def test_every_adapter_is_in_the_forward_pass(trained):
    import torch

    torch.testing.assert_close(trained.forward, trained.stacked, rtol=0, atol=1e-4)


def test_only_the_last_adapter_moves(trained):
    assert trained.moved
    assert all(trained.trainable in name.split(".") for name in trained.moved)
    assert trained.gradients == trained.moved


def test_only_the_last_adapter_is_saved(trained):
    from harness.adapter_config import CONFIG_NAME
    from harness.adapter_files import WEIGHTS_NAME, read_adapter

    assert {file.name for file in trained.folder.iterdir()} == {CONFIG_NAME, WEIGHTS_NAME}
    moved = {name.split(".lora_")[0] for name in trained.moved}
    saved = {f"base_model.model.{module}" for module in read_adapter(trained.folder).pairs}
    assert saved == moved
