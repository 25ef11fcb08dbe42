"""Who answers questions about pictures: a server that speaks OpenAI's protocol, or a vision-language model here."""

import base64
import email.utils
import io
import os
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image

from focusdpo_lib import params
from focusdpo_lib.dip.answers import Purse, Reply
from focusdpo_lib.dip.models import StageError, load_model
from focusdpo_lib.dip.questions import SCHEMA

KEY = "OPENAI_API_KEY"  # the only place that a key is read from
OPENAI = "https://api.openai.com/v1"
UNREADABLE = Reply("")
REFUSED_BY_FILTER = ("content_filter", "content_policy_violation")
Question = tuple[bytes | None, str]  # PNG, or no picture, and prompt
Keep = Callable[[int, Reply], None]


class Captioner(Protocol):
    model: str  # as answers are kept under

    def ask(self, questions: Sequence[Question], keep: Keep) -> None:
        """Hands each reply to `keep(index, reply)` as it comes, in any order, from any thread."""


def load_captioner(settings: params.Captioning, folder: Path, schema: dict = SCHEMA) -> Captioner:
    """Raises StageError where the captioner cannot be had. What a server costs is counted in `folder`.

    `schema`: of the answers, as a server is told it; a model here reads it in the prompt's own words alone.
    """
    return Local(settings) if settings.by == "local" else Server(settings, Purse(folder, settings.budget), schema)


class Server:
    """GPT-4o, or whatever a compatible server calls `captioning.model`."""

    def __init__(self, settings: params.Captioning, purse: Purse, schema: dict = SCHEMA):
        self.settings, self.purse, self.model, self.schema = settings, purse, settings.model, schema
        self.address = settings.base_url or OPENAI
        self._stopped = threading.Event()
        key = os.environ.get(KEY, "").strip()
        if not key and settings.base_url is None:
            raise StageError(f"{KEY} is not set, and OpenAI's server needs it: set it, or set captioning.base_url")
        self._hidden = [key] if key else []
        try:
            from openai import OpenAI
        except ImportError:
            raise StageError("captioning by a server needs the package openai: install the extra [caption]") from None
        self._client = OpenAI(api_key=key or "none", base_url=self.address, timeout=settings.timeout, max_retries=0)

    def ask(self, questions: Sequence[Question], keep: Keep) -> None:
        """Raises StageError where the server stays silent, turns us away, or the budget is used up."""
        with ThreadPoolExecutor(self.settings.parallel) as threads:
            asked = [threads.submit(self._kept, index, question, keep) for index, question in enumerate(questions)]
            try:
                for answer in asked:
                    answer.result()
            except BaseException:
                self._stopped.set()
                threads.shutdown(cancel_futures=True)
                raise

    def _kept(self, index: int, question: Question, keep: Keep) -> None:
        if not self._stopped.is_set():
            keep(index, self._answer(*question))

    def _answer(self, picture: bytes | None, prompt: str) -> Reply:
        """The reply, asked for again after every fault that may pass."""
        wait, told, reason = self.settings.first_wait, 0.0, ""
        for attempt in range(self.settings.retries + 1):
            if attempt:
                self._stopped.wait(max(told, wait * random.uniform(0.5, 1)))
                if self._stopped.is_set():
                    break
                wait = min(2 * wait, self.settings.longest_wait)
            try:
                return self._once(picture, prompt)
            except _Fault as fault:
                reason, told = str(fault), fault.wait
                if fault.wait > self.settings.longest_wait:
                    raise self._silent(f"it asks to wait {fault.wait:.0f} s") from None
        if reason == _Garbled.reason:
            return UNREADABLE
        raise self._silent(reason)

    def _once(self, picture: bytes | None, prompt: str) -> Reply:
        """One question. Raises _Fault where another try may help, and StageError where none will."""
        import openai

        content: list[dict] = [{"type": "text", "text": prompt}]
        if picture is not None:
            shown = "data:image/png;base64," + base64.b64encode(picture).decode()
            content.append({"type": "image_url", "image_url": {"url": shown}})
        with self.purse.paying(self._most(prompt)) as settle:
            try:
                response = _within(self.settings.longest_answer, self._client.chat.completions.create)(
                    model=self.model,
                    messages=[{"role": "user", "content": content}],
                    response_format={"type": "json_schema", "json_schema": self.schema},
                    max_tokens=self.settings.max_tokens,
                    temperature=0,
                    seed=self.settings.seed,
                )
            except TimeoutError:
                raise _Fault(f"an answer takes more than {self.settings.longest_answer:g} s") from None
            except openai.APIConnectionError as error:  # cut or too slow: it may have been charged
                raise _Fault(self._said(error)) from None
            except openai.APIStatusError as error:
                settle(0)
                return self._turned_away(error)
            except (openai.APIError, ValueError):  # whole, but no JSON
                raise _Garbled() from None
            reply = self._read(response)
            settle(reply.cost)
            return reply

    def _most(self, prompt: str) -> float:
        """Dollars that an answer costs at most: a letter is a token or less."""
        return self._cost(len(prompt) + self.settings.image_tokens, self.settings.max_tokens)

    def _cost(self, read: int, written: int) -> float:
        return (read * self.settings.price_read + written * self.settings.price_written) / 1e6

    def _read(self, response) -> Reply:
        choice = (getattr(response, "choices", None) or [None])[0]
        usage = getattr(response, "usage", None)
        tokens = (getattr(usage, "prompt_tokens", 0) or 0, getattr(usage, "completion_tokens", 0) or 0)
        facts = {"model": str(getattr(response, "model", "")), "tokens": tokens, "cost": self._cost(*tokens)}
        message = getattr(choice, "message", None)
        refused = bool(getattr(message, "refusal", None)) or (choice and choice.finish_reason == "content_filter")
        return Reply(getattr(message, "content", None) or "", bool(refused), **facts)

    def _turned_away(self, error) -> Reply:
        """What follows from an error of HTTP: a refusal, another try (_Fault), or the end (StageError)."""
        status, code = error.status_code, str(getattr(error, "code", "") or "")
        if status in (408, 409, 429) or status >= 500:
            if code == "insufficient_quota":
                raise self._ended("says that its quota is used up: pay for more, and run again")
            raise _Fault(f"HTTP {status}", _retry_after(error.response.headers))
        if status == 400 and code in REFUSED_BY_FILTER:
            return Reply("", refused=True)
        if status in (401, 403):
            raise self._ended(f"does not accept the key (HTTP {status}): set {KEY} to one that it accepts")
        raise self._ended(
            f"does not take the question (HTTP {status}: {self._said(error)}): correct captioning.model or "
            "captioning.base_url"
        )

    def _said(self, error: Exception) -> str:
        """An error's words, in one line and without a key."""
        text = " ".join(str(error).split())[:200]
        for key in self._hidden:
            text = text.replace(key, "…")
        return re.sub(r"\bsk-\S+", "…", text)

    def _silent(self, reason: str) -> StageError:
        return self._ended(f"gives no answer ({reason}): see that it runs and can be reached, and run again")

    def _ended(self, what: str) -> StageError:
        return StageError(f"the server {self.address} {what}; all answers so far are kept in {self.purse.file.parent}")


class _Fault(Exception):
    """An answer that may come another time, after `wait` seconds or more."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


class _Garbled(_Fault):
    reason = "it is no JSON"

    def __init__(self):
        super().__init__(self.reason)


def _within(seconds: float, call: Callable) -> Callable:
    """`call`, which raises TimeoutError where it has not returned in time: silence alone is what HTTP clients time.

    The thread that waits for it is left to itself, and ends with the process.
    """

    def timed(*words, **named):
        answer: Future = Future()

        def wait() -> None:
            try:
                answer.set_result(call(*words, **named))
            except BaseException as error:
                answer.set_exception(error)

        threading.Thread(target=wait, daemon=True).start()
        return answer.result(seconds)

    return timed


def _retry_after(headers) -> float:
    """Seconds that a server asks to wait: a number, or the time of day."""
    said = headers.get("retry-after", "")
    try:
        return max(0.0, float(said))
    except ValueError:
        pass
    moment = email.utils.parsedate_tz(said)
    return max(0.0, email.utils.mktime_tz(moment) - time.time()) if moment else 0.0


class Local:
    """A vision-language model of the Qwen3-VL family, from a folder or hub id; it decodes greedily."""

    def __init__(self, settings: params.Captioning):
        import transformers as hf

        from focusdpo_lib.backbones.family import chosen_precision
        from focusdpo_lib.backbones.loading import best_device

        dtype = chosen_precision("auto", torch.device(best_device()))
        kinds = (hf.Qwen3VLForConditionalGeneration, hf.Qwen3VLProcessor)
        self.network, self.processor = load_model(
            *kinds, settings.model, settings.revision, "captioning.model", dtype=dtype
        )
        self.processor.tokenizer.padding_side = "left"  # so that every answer begins where its question ends
        self.settings, self.model = settings, "@".join(filter(None, (settings.model, settings.revision)))

    @torch.no_grad()
    def ask(self, questions: Sequence[Question], keep: Keep) -> None:
        for start in range(0, len(questions), self.settings.parallel):
            some = questions[start : start + self.settings.parallel]
            talks = [
                [{"role": "user", "content": [{"type": "image"}] * bool(picture) + [{"type": "text", "text": prompt}]}]
                for picture, prompt in some
            ]
            texts = [self.processor.apply_chat_template(talk, add_generation_prompt=True) for talk in talks]
            pictures = [Image.open(io.BytesIO(picture)).convert("RGB") for picture, _ in some if picture]
            inputs = self.processor(text=texts, images=pictures or None, padding=True, return_tensors="pt")
            inputs = inputs.to(self.network.device)
            output = self.network.generate(**inputs, max_new_tokens=self.settings.max_tokens, do_sample=False)
            written = output[:, inputs.input_ids.shape[1] :]
            said = self.processor.batch_decode(written, skip_special_tokens=True)
            end = self.processor.tokenizer.pad_token_id
            for index, text in enumerate(said):
                tokens = (int(inputs.attention_mask[index].sum()), int((written[index] != end).sum()))
                keep(start + index, Reply(text, model=self.model, tokens=tokens))
