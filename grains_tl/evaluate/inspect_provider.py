"""A model provider for Inspect AI (extra ``inspect``): ``inspect eval task.py --model grains_tl/smollm2 -M vectors=FILE``.

Inspect finds this module by the entry point ``inspect_ai`` of the installed package; nothing else imports it.
"""

from __future__ import annotations

import asyncio
from typing import Any

from inspect_ai.model import ChatMessage, GenerateConfig, ModelAPI, ModelOutput, ModelUsage, modelapi
from inspect_ai.tool import ToolChoice, ToolInfo

from grains_tl._util.errors import OptionError
from grains_tl.evaluate.model_args import steered_model
from grains_tl.inference.generation import generate
from grains_tl.tokens.prompts import prompt_inputs

#: Tokens of an answer where neither the task nor the command line says.
MAX_TOKENS = 256


@modelapi(name="grains_tl")
def grains_tl() -> type[ModelAPI]:
    """What Inspect calls to get the provider's class."""
    return SteeredModelAPI


class SteeredModelAPI(ModelAPI):
    """A model with a steering on, see ``steered_model`` for ``-M`` arguments.

    Conversations are rendered with the model's chat template; without one, a single message of the user is the prompt as it
    is. One answer is written at a time. Tools, images and log-probabilities are not supported, and said so.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 (as in the class above)
        **model_args: Any,
    ) -> None:
        super().__init__(model_name=model_name, base_url=base_url, api_key=api_key, api_key_vars=[], config=config)
        self.model, self.steering = steered_model(model_name.removeprefix("grains_tl/") or None, model_args)
        self.lock = asyncio.Lock()

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """The model's answer to a conversation."""
        if tools:
            raise OptionError(f"the task gives the model tools ({[tool.name for tool in tools]}), which it cannot call")
        if config.logprobs or (config.num_choices or 1) > 1:
            raise OptionError("logprobs and num_choices are not supported; use gr.score_pairs for log-probabilities")
        prompt = self._prompt(input)
        limit = config.max_tokens or MAX_TOKENS
        async with self.lock:  # hooks belong to the model, so one run at a time
            (text,) = generate(
                self.model,
                [prompt],
                self.steering,
                max_new_tokens=limit,
                temperature=config.temperature or 0.0,
                seed=config.seed or 0,
            )
        for stop in config.stop_seqs or []:
            text = text.partition(stop)[0]
        read, written = len(prompt_inputs(self.model, prompt)[0]), len(self.model.tokenizer(text)["input_ids"])
        output = ModelOutput.from_content(
            self.model_name, text, stop_reason="max_tokens" if written >= limit else "stop"
        )
        output.usage = ModelUsage(input_tokens=read, output_tokens=written, total_tokens=read + written)
        return output

    def _prompt(self, messages: list[ChatMessage]) -> Any:
        if any(not isinstance(message.content, str) and message.text != message.content for message in messages):
            kinds = {part.type for m in messages if not isinstance(m.content, str) for part in m.content}
            if kinds != {"text"}:
                raise OptionError(f"the conversation has {sorted(kinds)}; expected text alone")
        if getattr(self.model.tokenizer, "chat_template", None):
            return [{"role": message.role, "content": message.text} for message in messages]
        if len(messages) > 1:
            raise OptionError(
                f"{len(messages)} messages for a model without a chat template; expected a single prompt of the user"
            )
        return messages[0].text

    def max_connections(self) -> int:
        """One, as the hooks belong to the model."""
        return 1
