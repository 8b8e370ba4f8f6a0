"""A byte-level tokenizer with a chat template, made in memory."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# The generation markers are what `assistant_only_loss` reads its mask from; the end-of-turn token is inside them, so
# that the model learns to stop. Each message is rendered alone: appending a message only appends text.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Give a tokenizer of 259 tokens: the 256 bytes, padding, start of turn, and end of turn, which is the EOS token.

    Text in Unicode's normal form C round-trips, one token a byte. Pad and EOS differ; there is no BOS token. The chat
    template is ChatML with generation markers. `save_pretrained` and `AutoTokenizer.from_pretrained(path)` work as
    with any tokenizer.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    backend.normalizer = normalizers.NFC()  # AutoTokenizer adds it where the model is a Qwen2
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([PAD, TURN_START, TURN_END])  # ids 256, 257 and 258, which the tiny models default to
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=TURN_END,
        extra_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
