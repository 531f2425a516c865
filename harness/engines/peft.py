"""The reference engine: transformers and PEFT in this process.

The base is loaded once and every adapter once; a mode is entered for a call and left after it.
Greedy by default, left-padded batches, results in the order of the prompts. Knows nothing of
snapshots, verdicts or reports.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from harness.adapter_files import AdapterFiles, read_adapter
from harness.checkpoint_files import read_checkpoint
from harness.completion import (
    Application,
    Completion,
    GenerationSettings,
    Prompt,
    StopReason,
)
from harness.engines.application import apply_mode, rest
from harness.engines.held_model import HeldModel
from harness.engines.loading import (
    choose_device,
    choose_dtype,
    load_adapters,
    load_base,
    load_tokenizer,
)
from harness.engines.padding import padded
from harness.engines.templating import templated_ids
from harness.engines.witness import Witness, compare_base_with_files
from harness.errors import InputError
from harness.files.tensor_files import DTYPE_BYTES
from harness.preflight import check_stack_files
from harness.stack import AdapterStack, Mode

__all__ = ["PeftEngine", "Progress"]

#: Called with the mode's name and a share of the work done, 0 to 1.
Progress = Callable[[str, float], None]

_TINY_BYTES = 32 << 20
_BATCH_SIZE = {"cpu": 16}
_BATCH_SIZE_ELSEWHERE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """A prompt's place in the caller's list, its token ids, and what it has already produced."""

    place: int
    prompt: Prompt
    ids: tuple[int, ...]
    begun: tuple[int, ...] = ()

    @property
    def given(self) -> tuple[int, ...]:
        """What the model is given: prompt and beginning."""
        return self.ids + self.begun


class PeftEngine(HeldModel):
    """One loaded stack. Prefer `harness.load_engine`, and use it as a context manager.

    Attributes:
        model: the PEFT-wrapped model (the plain base for a stack without adapters); at rest, with
            every adapter off.
        tokenizer: the base's, padding left.
        files: the adapters' files by name.
        generation_config: what the base's folder says about generating; only its EOS ids are used.
        template_source: whose chat template is used.
    """

    def __init__(
        self,
        stack: AdapterStack,
        *,
        device: str | None = None,
        dtype: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.stack = stack
        self.files: dict[str, AdapterFiles] = {
            adapter.name: read_adapter(adapter.path, trust_remote_code=trust_remote_code)
            for adapter in stack.adapters
        }
        check_stack_files(stack, trust_remote_code=trust_remote_code)
        chosen_dtype = choose_dtype(dtype)
        self.checkpoint = read_checkpoint(stack.base.path)
        self._weight_bytes = sum(
            entry.count
            * (DTYPE_BYTES[entry.dtype] if isinstance(chosen_dtype, str) else chosen_dtype.itemsize)
            for shard in self.checkpoint.shards
            for entry in shard.entries.values()
        )
        self._placement = choose_device(device, self._weight_bytes)
        self.tokenizer, self.template_source = load_tokenizer(
            stack, trust_remote_code=trust_remote_code
        )
        model = load_base(
            self.checkpoint,
            device=self._placement,
            dtype=chosen_dtype,
            trust_remote_code=trust_remote_code,
        )
        self.generation_config = model.generation_config
        eos = self.generation_config.eos_token_id
        self.eos_token_ids: tuple[int, ...] = (
            () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
        )
        # A checkpoint's own sampling settings would leak into every call that leaves one unset.
        model.generation_config = GenerationConfig(eos_token_id=list(self.eos_token_ids) or None)
        _keep_head_contiguous(model)
        self.model = load_adapters(model, stack.adapters, self.files, self._placement)
        if stack.adapters:
            rest(self.model)
        compare_base_with_files(self.model, self.checkpoint)
        self._witness = Witness(self.model)

    @property
    def context_length(self) -> int:
        """Positions that the model was built for; prompt and completion share them."""
        config = self.model.config
        return int(getattr(config, "max_position_embeddings", None) or 1 << 30)

    @contextlib.contextmanager
    def mode(
        self, mode: Mode | str, application: Application = Application.LIVE
    ) -> Iterator[torch.nn.Module]:
        """Enter *mode* for the block; yields the model with exactly its adapters applied.

        Raises:
            ActivationError: what is active, read back per layer, is not the mode; or a weight is
                no longer what was loaded, before the mode or after it.
            InputError: an unknown mode, or weights that cannot be merged or flattened in memory.
        """
        chosen = self.stack.mode(mode) if isinstance(mode, str) else mode
        for name in chosen.adapters:
            self.stack.adapter(name)
        self._witness.check(self.model, f"before mode {chosen.name}")
        with self._entered(chosen, application):
            yield self.model
        self._witness.check(self.model, f"after mode {chosen.name}")

    @contextlib.contextmanager
    def _entered(self, chosen: Mode, application: Application) -> Iterator[None]:
        if not self.stack.adapters:
            yield
            return
        with apply_mode(self.model, chosen, application, self.files):
            yield

    @contextlib.contextmanager
    def threads(self) -> Iterator[None]:
        """One thread for a tiny model on a CPU: threads cost it more than they bring."""
        before = torch.get_num_threads()
        tiny = self.device == "cpu" and self._weight_bytes < _TINY_BYTES
        torch.set_num_threads(1 if tiny else before)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def token_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """The prompt's token ids, through the chat template if it has messages.

        Raises:
            InputError: there is no chat template, or it refuses the messages; an empty prompt; a
                prompt that fills the context.
        """
        if prompt.text is not None:
            ids = self.tokenizer(prompt.text)["input_ids"]
        else:
            ids = templated_ids(self.tokenizer, prompt)
        if not ids:
            raise InputError("has no tokens", where=f"prompt {prompt.id}", remedy="write some text")
        if len(ids) >= self.context_length:
            raise InputError(
                f"has {len(ids)} tokens, the model's context holds {self.context_length}",
                where=f"prompt {prompt.id}",
                remedy="shorten it",
            )
        return tuple(ids)

    def generate(
        self,
        prompts: Sequence[Prompt],
        mode: Mode | str,
        settings: GenerationSettings | None = None,
        *,
        application: Application = Application.LIVE,
        begun: Sequence[Sequence[int]] | None = None,
        progress: Progress | None = None,
        finished: Callable[[Completion], None] | None = None,
    ) -> tuple[Completion, ...]:
        """Complete every prompt in *mode*; the results come in the order of the prompts.

        Args:
            begun: token ids that each completion already begins with; they count as produced.
            finished: called with each completion when its batch is through, the shortest prompts
                first: what an interrupt leaves.
        """
        settings = settings or GenerationSettings()
        if settings.do_sample and settings.seed is None:
            raise InputError("do_sample needs a seed", where="generation", remedy="set seed = 0")
        chosen = self.stack.mode(mode) if isinstance(mode, str) else mode
        requests = [
            _Request(
                place=place,
                prompt=prompt,
                ids=self.token_ids(prompt),
                begun=tuple(begun[place]) if begun is not None else (),
            )
            for place, prompt in enumerate(prompts)
        ]
        done: dict[int, Completion] = {}
        with self.mode(chosen, application), torch.inference_mode(), self.threads():
            for batch in self._batches(requests, settings):
                start, share = len(done) / len(requests), len(batch) / len(requests)

                def report(part: float, start: float = start, share: float = share) -> None:
                    if progress is not None:
                        progress(chosen.name, start + share * part)

                rows = self._generate_batch(batch, settings, report)
                for request, row in zip(batch, rows, strict=True):
                    done[request.place] = self.completion(
                        request.prompt, request.ids, row, chosen, application, settings
                    )
                    if finished is not None:
                        finished(done[request.place])
                report(1.0)
        return tuple(done[place] for place in range(len(requests)))

    def _batches(
        self, requests: Sequence[_Request], settings: GenerationSettings
    ) -> Iterator[list[_Request]]:
        """Prompts of like length together; the cut depends on nothing but the prompts."""
        kind = torch.device(self.device).type
        size = settings.batch_size or _BATCH_SIZE.get(kind, _BATCH_SIZE_ELSEWHERE)
        ordered = sorted(requests, key=lambda request: (len(request.given), request.place))
        for start in range(0, len(ordered), size):
            yield ordered[start : start + size]

    def room(self, length: int, settings: GenerationSettings) -> int:
        """How many tokens a prompt of *length* tokens may produce."""
        return min(settings.max_new_tokens, self.context_length - length)

    def _generate_batch(
        self,
        batch: Sequence[_Request],
        settings: GenerationSettings,
        report: Callable[[float], None],
    ) -> list[list[int]]:
        pad = self.pad_token_id
        ids, mask = padded([request.given for request in batch], pad, side="left")
        width = ids.shape[1]
        new_tokens = max(
            self.room(len(request.ids), settings) - len(request.begun) for request in batch
        )
        config = GenerationConfig(
            max_new_tokens=new_tokens,
            do_sample=settings.do_sample,
            num_beams=1,
            repetition_penalty=settings.repetition_penalty,
            eos_token_id=list(self.eos_token_ids) or None,
            pad_token_id=pad,
            stop_strings=list(settings.stop_strings) or None,
            **(
                {
                    "temperature": settings.temperature,
                    "top_p": settings.top_p,
                    "top_k": settings.top_k,
                }
                if settings.do_sample
                else {}
            ),
        )
        if settings.seed is not None:
            torch.manual_seed(settings.seed)
        output = self.model.generate(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([_Reporter(report, width, new_tokens)]),
            **({"tokenizer": self.tokenizer} if settings.stop_strings else {}),
        )
        rows: list[list[int]] = output[:, width:].tolist()
        return [[*request.begun, *row] for request, row in zip(batch, rows, strict=True)]

    @property
    def pad_token_id(self) -> int:
        """A padding id that is no EOS: rows that a string stopped are padded, not ended."""
        pad = self.tokenizer.pad_token_id
        if pad is not None and pad not in self.eos_token_ids:
            return int(pad)
        return next(n for n in range(len(self.eos_token_ids) + 1) if n not in self.eos_token_ids)

    def completion(
        self,
        prompt: Prompt,
        prompt_token_ids: tuple[int, ...],
        row: Sequence[int],
        mode: Mode,
        application: Application,
        settings: GenerationSettings,
    ) -> Completion:
        """The completion that a produced *row* of tokens is: cut where it ends, and why it ends.

        The row may hold padding after its end, and must go on to its end.
        """
        room = self.room(len(prompt_token_ids), settings)
        tokens, reason = self._cut(list(row[:room]), settings)
        if reason is StopReason.LENGTH and room < settings.max_new_tokens:
            reason = StopReason.CONTEXT
        return Completion(
            prompt=prompt,
            mode=mode.name,
            application=application,
            prompt_token_ids=prompt_token_ids,
            token_ids=tuple(tokens),
            text=self._text(tokens),
            stop_reason=reason,
            settings=replace(settings, batch_size=0),
        )

    def _cut(self, row: list[int], settings: GenerationSettings) -> tuple[list[int], StopReason]:
        """`generate` gives no finish reason: the first EOS, then a stop string, else the length."""
        for place, token in enumerate(row):
            if token in self.eos_token_ids:
                return row[: place + 1], StopReason.EOS
        if settings.stop_strings and any(s in self._text(row) for s in settings.stop_strings):
            for end in range(1, len(row) + 1):
                if any(s in self._text(row[:end]) for s in settings.stop_strings):
                    return row[:end], StopReason.STOP_STRING
        return row, StopReason.LENGTH

    def _text(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def logits(
        self,
        token_ids: Sequence[Sequence[int]],
        mode: Mode | str,
        *,
        application: Application = Application.LIVE,
    ) -> list[Tensor]:
        """The logits of every position, one forward pass for all rows (teacher forcing).

        Returns:
            One float32 CPU tensor a row, `(len(row), vocabulary)`.
        """
        # Padding on the right: causal attention never looks at it, positions start at 0.
        ids, mask = padded(token_ids, self.pad_token_id, side="right")
        with self.mode(mode, application) as model, torch.inference_mode(), self.threads():
            output = model(
                input_ids=ids.to(self.device), attention_mask=mask.to(self.device), use_cache=False
            )
            return [
                output.logits[place, : len(row)].float().cpu()
                for place, row in enumerate(token_ids)
            ]


class _Reporter(StoppingCriteria):  # type: ignore[misc]
    """Tells how far a batch is; never stops anything."""

    def __init__(self, report: Callable[[float], None], width: int, new_tokens: int) -> None:
        self.report, self.width, self.new_tokens = report, width, new_tokens

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.report(min(1.0, (input_ids.shape[1] - self.width) / self.new_tokens))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _keep_head_contiguous(model: Any) -> None:
    """Hand the head a contiguous slice.

    `generate` keeps the last position's hidden state, a strided view; in bfloat16 on a CPU that
    sends the head's product down a path that copies the head once a row (measured: prefill of 16
    rows ten times slower). See docs/engines.md.
    """
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
