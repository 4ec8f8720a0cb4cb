"""The one prompt of calibration, training and evaluation: Alpaca's, with and without an input."""

from eval.tasks.base import ALPACA_PROMPT

# Of a row with an input that is not empty (tatsu-lab/stanford_alpaca, train.py).
ALPACA_INPUT_PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


def format_prompt(instruction: str, input_text: str = "") -> str:
    """Format the prompt of one row; `input_text` is the row's input, empty where it has none."""
    if input_text:
        return ALPACA_INPUT_PROMPT.format(instruction=instruction, input=input_text)
    return ALPACA_PROMPT.format(instruction=instruction)
