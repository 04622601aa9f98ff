"""The paper's layers: learners, the fuser, and transformer blocks that run on learned tokens."""

from ..utils.lazy import lazy_exports
from ..utils.moved import moved_names

TYPE_CHECKING = False  # as typing has it, whose import would take most of the time

if TYPE_CHECKING:
    from .blocks import FusedBlock as FusedBlock
    from .blocks import OverlapEnd as OverlapEnd
    from .blocks import PatchGrid as PatchGrid
    from .blocks import PositionFreeBlock as PositionFreeBlock
    from .blocks import ReducedBlock as ReducedBlock
    from .onednn import OneDNNLinear as OneDNNLinear
    from .onednn import use_onednn as use_onednn
    from .token_connector import NeighborPooling as NeighborPooling
    from .token_connector import NeighborTokenLearner as NeighborTokenLearner
    from .token_connector import TokenConnector as TokenConnector
    from .token_fuser import TokenFuser as TokenFuser
    from .token_learner import LEARNERS as LEARNERS
    from .token_learner import TokenLearner as TokenLearner
    from .token_learner import TokenLearnerModuleV11 as TokenLearnerModuleV11
    from .token_learner import TokenLearnerV11 as TokenLearnerV11

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "blocks": (
            "FusedBlock",
            "OverlapEnd",
            "PatchGrid",
            "PositionFreeBlock",
            "ReducedBlock",
        ),
        "functional": (),
        "onednn": (
            "OneDNNLinear",
            "use_onednn",
        ),
        "token_connector": ("NeighborPooling", "NeighborTokenLearner", "TokenConnector"),
        "token_fuser": ("TokenFuser",),
        "token_learner": (
            "LEARNERS",
            "TokenLearner",
            "TokenLearnerModuleV11",
            "TokenLearnerV11",
        ),
    },
    moved_names("layers"),
)
