"""Whether a row is a conversation."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("seed", ["0", "1"])
def test_its_prompt_says_whether_a_row_is_a_conversation(seed):
    """TRL looks at one column; with these two seeds at the one and at the other."""
    code = (
        "from trl_kd.preferences.tokens import is_conversational as found\n"
        "messages = [{'role': 'user', 'content': '1+1='}]\n"
        "assert found({'prompt': messages, 'completion': '2'})\n"
        "assert found({'chosen': messages, 'rejected': messages})\n"
        "assert not found({'prompt': '1+1=', 'completion': '2'})\n"
    )
    subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PATH": ""}, check=True)
