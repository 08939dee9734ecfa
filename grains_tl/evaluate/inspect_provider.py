"""A model provider for Inspect AI (extra ``inspect``): ``inspect eval task.py --model grains_tl/smollm2 -M vectors=FILE``.

Inspect finds this module by the entry point ``inspect_ai`` of the installed package; nothing else imports it.
"""

from __future__ import annotations

import asyncio
from importlib import util
from typing import Any

from grains_tl._util.errors import OptionError
from grains_tl.evaluate.model_args import steered_model
from grains_tl.inference.generation import generate
from grains_tl.tokens.prompts import prompt_inputs

#: Tokens of an answer where neither the task nor the command line says.
MAX_TOKENS = 256


def register() -> Any:
    """Make the provider known to Inspect as ``grains_tl``, and return its class.

    Conversations are rendered with the model's chat template; without one, a single message of the user is the prompt as it
    is. One answer is written at a time. Tools, images and log-probabilities are not supported, and said so.

    Raises:
        ImportError: inspect-ai is not installed.
    """
    from inspect_ai.model import GenerateConfig, ModelAPI, modelapi

    class SteeredModelAPI(ModelAPI):  # type: ignore[misc, unused-ignore]
        """A model with a steering on, see ``steered_model`` for ``-M`` arguments."""

        def __init__(
            self,
            model_name: str,
            base_url: str | None = None,
            api_key: str | None = None,
            config: Any = GenerateConfig(),  # noqa: B008 (as in the class above)
            **model_args: Any,
        ) -> None:
            super().__init__(model_name=model_name, base_url=base_url, api_key=api_key, api_key_vars=[], config=config)
            self.model, self.steering = steered_model(model_name.removeprefix("grains_tl/") or None, model_args)
            self.lock = asyncio.Lock()

        async def generate(self, input: Any, tools: Any, tool_choice: Any, config: Any) -> Any:
            prompt = _prompt(self.model, input, tools, config)
            async with self.lock:  # hooks belong to the model, so one run at a time
                return _answer(self.model_name, self.model, prompt, self.steering, config)

        def max_connections(self) -> int:
            return 1

    @modelapi(name="grains_tl")
    def provider() -> type[ModelAPI]:
        return SteeredModelAPI

    return SteeredModelAPI


def _prompt(model: Any, messages: Any, tools: Any, config: Any) -> Any:
    """What ``generate`` takes; OptionError for what it cannot do."""
    if tools:
        raise OptionError(f"the task gives the model tools ({[tool.name for tool in tools]}), which it cannot call")
    if config.logprobs or (config.num_choices or 1) > 1:
        raise OptionError("logprobs and num_choices are not supported; use gr.score_pairs for log-probabilities")
    kinds = {part.type for message in messages if not isinstance(message.content, str) for part in message.content}
    if kinds - {"text"}:
        raise OptionError(f"the conversation has parts of {sorted(kinds)}; expected text alone")
    if getattr(model.tokenizer, "chat_template", None):
        return [{"role": message.role, "content": message.text} for message in messages]
    if len(messages) > 1:
        raise OptionError(
            f"{len(messages)} messages for a model without a chat template; expected a single prompt of the user"
        )
    return messages[0].text


def _answer(name: str, model: Any, prompt: Any, steering: Any, config: Any) -> Any:
    from inspect_ai.model import ModelOutput, ModelUsage

    limit = config.max_tokens or MAX_TOKENS
    (text,) = generate(
        model,
        [prompt],
        steering,
        max_new_tokens=limit,
        temperature=config.temperature or 0.0,
        seed=config.seed or 0,
    )
    for stop in config.stop_seqs or []:
        text = text.partition(stop)[0]
    read, written = len(prompt_inputs(model, prompt)[0]), len(model.tokenizer(text)["input_ids"])
    output = ModelOutput.from_content(name, text, stop_reason="max_tokens" if written >= limit else "stop")
    output.usage = ModelUsage(input_tokens=read, output_tokens=written, total_tokens=read + written)
    return output


if util.find_spec("inspect_ai") is not None:
    register()
