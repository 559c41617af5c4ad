"""What happens to a conversation, as pure functions on values: no TensorDict, no torchrl, no server.

A conversation is a :class:`Transcript`, what a policy does in it is a :class:`Turn`, and each of the functions takes
conversations and returns new ones: :func:`answer` enters what the policy did, :func:`append` what others say,
:func:`begin` and :func:`edit` let the policy go on with words that it did not sample. :class:`Limits` say when an episode ends,
and :class:`MessageEnv` is how people write what replies to the policy.
"""

from torchrl_chat.conversation.answering import answer
from torchrl_chat.conversation.appending import append
from torchrl_chat.conversation.editing import answer_text, begin, edit
from torchrl_chat.conversation.environment import MessageEnv, Reply
from torchrl_chat.conversation.limits import Limits
from torchrl_chat.conversation.stop import StopReason
from torchrl_chat.conversation.transcript import Branch, Transcript
from torchrl_chat.conversation.turn import ResponseError, Turn

__all__ = [
    "Branch",
    "Limits",
    "MessageEnv",
    "Reply",
    "ResponseError",
    "StopReason",
    "Transcript",
    "Turn",
    "answer",
    "answer_text",
    "append",
    "begin",
    "edit",
]
