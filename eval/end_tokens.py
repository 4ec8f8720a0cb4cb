"""What a tokenizer or a server leaves in a text where a response ended."""

import re

_TOKENS = (
    r"(?:<[|\uff5c][^|\uff5c<>\n]{1,40}[|\uff5c]>|</s>|<(?:eos|pad|unk|bos)>"
    r"|<(?:end|start)_of_turn>|\[/INST\]"
    # not an index of a list, and no comparison a<s>b
    r"|(?<![A-Za-z_])\[(?:INST|EOS|DONE|PAD)\]|<s>(?=\s*(?:\Z|[<\[A-Z])))"
)
# A token between quotes is a string of a program: vocabulary["<pad>"].
END_TOKEN = re.compile(rf"(?<![\"']){_TOKENS}|{_TOKENS}(?![\"'])")
