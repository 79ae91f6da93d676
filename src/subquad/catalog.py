"""What the library holds, as data: the 70 systems, what they stand on, and the table from public names to objects.

Nothing is imported until it is asked for: names are strings ``"package.module:Name"``. Adding a system fills its row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CAUSAL_SELF, FULL_SELF = "causal self", "non-causal self"
CAUSAL_CROSS, FULL_CROSS = "causal cross", "non-causal cross"
PREFIX_SELF = "prefix-causal self"
ALL_BACKENDS = ("reference", "chunked", "cpu", "gpu")
TORCH_ONLY = ("reference", "chunked")


@dataclass(frozen=True)
class Named:
    """An object and the options with which it answers to its name."""

    path: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class System:
    """One row: a system of a paper, or a method that others are compared with.

    Attributes:
        number: of the paper, 1 to 70; None for what is no paper's own.
        slug: names its claim ``subquad.claims.<slug>``.
        name, title: short name; the paper's title.
        kind: what it is, in a few words.
        names: floor -> public name -> object.
        patterns: uses that its mixers serve together.
        backends: backends of its ops.
        state: ``planned`` or ``built``.
    """

    number: int | None
    slug: str
    name: str
    title: str
    kind: str
    names: Mapping[str, Mapping[str, Named]] = field(default_factory=dict)
    patterns: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    state: str = "planned"

    @property
    def claim(self) -> str | None:
        """The module of its claim, for a built system of a paper."""
        return f"subquad.claims.{self.slug}" if self.number is not None and self.state == "built" else None


FOUNDATIONS = (
    System(
        None,
        "softmax",
        "Softmax attention",
        "Attention Is All You Need (Vaswani et al. 2017)",
        "op, mixer",
        names={
            "ops": {"softmax_attention": Named("subquad.ops:softmax_attention")},
            "mixers": {
                "softmax": Named("subquad.mixers.softmax:SoftmaxAttention"),
                "sliding_window": Named("subquad.mixers.softmax:SoftmaxAttention", {"window_size": 256}),
            },
            "positions": {
                "rope": Named("subquad.positions.rope:apply_rope"),
                "sinusoidal": Named("subquad.positions.absolute:SinusoidalPositions"),
                "learned": Named("subquad.positions.absolute:LearnedPositions"),
            },
        },
        patterns=(CAUSAL_SELF, FULL_SELF, CAUSAL_CROSS, FULL_CROSS, PREFIX_SELF),
        backends=TORCH_ONLY,
        state="built",
    ),
    System(
        None,
        "linear",
        "Linear attention",
        "Transformers are RNNs (Katharopoulos et al. 2020)",
        "op, mixer",
        names={
            "ops": {"linear_attention": Named("subquad.ops:linear_attention")},
            "mixers": {"linear": Named("subquad.mixers.linear:LinearAttention")},
        },
        patterns=(CAUSAL_SELF, FULL_SELF, CAUSAL_CROSS, FULL_CROSS),
        backends=ALL_BACKENDS,
        state="built",
    ),
    System(
        None,
        "retention",
        "Retention",
        "Retentive Network: A Successor to Transformer for Large Language Models (Sun et al. 2023)",
        "mixer",
        names={"mixers": {"retention": Named("subquad.mixers.retention:Retention")}},
        patterns=(CAUSAL_SELF,),
        backends=ALL_BACKENDS,
        state="built",
    ),
    System(
        None,
        "feedforward",
        "Feed-forward layers",
        "Position-wise feed-forward (Vaswani et al. 2017) and GLU variants (Shazeer 2020)",
        "feed-forward",
        names={
            "ops": {"short_convolution": Named("subquad.ops:short_convolution")},
            "feedforwards": {
                "swiglu": Named("subquad.feedforward.glu:GatedFeedForward", {"activation": "silu"}),
                "gelu": Named("subquad.feedforward.mlp:FeedForward", {"activation": "gelu"}),
                "relu": Named("subquad.feedforward.mlp:FeedForward", {"activation": "relu"}),
            },
        },
        state="built",
    ),
    System(
        None,
        "mamba2",
        "Mamba-2",
        "Transformers are SSMs (Dao and Gu 2024)",
        "op",
        names={"ops": {"ssd": Named("subquad.ops:ssd")}},
        patterns=(CAUSAL_SELF,),
        backends=ALL_BACKENDS,
        state="built",
    ),
    System(
        None,
        "rwkv",
        "RWKV-4",
        "RWKV: Reinventing RNNs for the Transformer Era (Peng et al. 2023)",
        "op",
        names={"ops": {"wkv": Named("subquad.ops:wkv")}},
        patterns=(CAUSAL_SELF,),
        backends=ALL_BACKENDS,
        state="built",
    ),
    System(
        None,
        "xlstm",
        "xLSTM",
        "xLSTM: Extended Long Short-Term Memory (Beck et al. 2024)",
        "op",
        names={"ops": {"mlstm": Named("subquad.ops:mlstm")}},
        patterns=(CAUSAL_SELF,),
        backends=ALL_BACKENDS,
        state="built",
    ),
)

SYSTEMS = (
    System(1, "ap_pruning", "AP", "Selective Activation for De-sparsifying Pruned Neural Networks", "compression"),
    System(2, "rala", "RALA / RAVLT", "Breaking the Low-Rank Dilemma of Linear Attention", "mixer, vision model"),
    System(
        3,
        "lightning2",
        "Lightning-2",
        "Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models",
        "op",
        names={"ops": {"lightning_attention": Named("subquad.ops:lightning_attention")}},
        patterns=(CAUSAL_SELF,),
        backends=ALL_BACKENDS,
        state="built",
    ),
    System(
        4,
        "lightnet",
        "LightNet",
        "You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet",
        "op, mixer, positions",
        names={
            "ops": {"additive_attention": Named("subquad.ops:additive_attention")},
            "mixers": {"lightnet": Named("subquad.mixers.lightnet:LightNet")},
            "positions": {
                "md_lrpe": Named("subquad.positions.md_lrpe:MDLRPE"),
                "md_tpe": Named("subquad.positions.md_lrpe:MDTPE"),
            },
        },
        patterns=(CAUSAL_SELF, FULL_SELF, CAUSAL_CROSS, FULL_CROSS),
        backends=ALL_BACKENDS,
        state="built",
    ),
    System(
        5,
        "lightning_tnl",
        "Lightning Attention / TNL",
        "Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention",
        "language model",
        names={"mixers": {"lightning": Named("subquad.mixers.lightning:LightningAttention")}},
        patterns=(CAUSAL_SELF,),
        backends=ALL_BACKENDS,
        state="built",
    ),
    System(
        6,
        "gla",
        "GLA",
        "Gated Linear Attention Transformers with Hardware-Efficient Training",
        "op, mixer",
        names={
            "ops": {"gla": Named("subquad.ops:gla"), "simple_gla": Named("subquad.ops:simple_gla")},
            "mixers": {"gla": Named("subquad.mixers.gla:GatedLinearAttention")},
        },
        patterns=(CAUSAL_SELF,),
        backends=ALL_BACKENDS,
        state="built",
    ),
    System(
        7,
        "hedgehog",
        "Hedgehog",
        "The Hedgehog & the Porcupine, Expressive Linear Attentions with Softmax Mimicry",
        "feature maps, mixer, training",
        names={
            "ops": {"exponential_linear_attention": Named("subquad.ops:exponential_linear_attention")},
            "mixers": {
                "hedgehog": Named("subquad.mixers.linear:LinearAttention", {"feature_map": "hedgehog_softmax"}),
            },
        },
        patterns=(CAUSAL_SELF, FULL_SELF, CAUSAL_CROSS, FULL_CROSS),
        backends=ALL_BACKENDS,
        state="built",
    ),
    System(8, "lion", "LION", "Linear Group RNN for 3D Object Detection in Point Clouds", "point-cloud model"),
    System(
        9,
        "based",
        "BASED",
        "Simple linear attention language models balance the recall-throughput tradeoff",
        "op, mixers, language model",
        names={
            "ops": {"taylor_linear_attention": Named("subquad.ops:taylor_linear_attention")},
            "mixers": {
                "taylor_linear": Named(
                    "subquad.mixers.linear:LinearAttention", {"feature_map": "taylor", "feature_dim": 16}
                ),
                "base_conv": Named("subquad.mixers.base_conv:BaseConv"),
            },
        },
        patterns=(CAUSAL_SELF, FULL_SELF, CAUSAL_CROSS, FULL_CROSS),
        backends=ALL_BACKENDS,
        state="built",
    ),
    System(
        10,
        "deltanet",
        "DeltaNet",
        "Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
        "op, mixer",
        names={
            "ops": {
                "delta_rule": Named("subquad.ops:delta_rule"),
                "gated_delta_rule": Named("subquad.ops:gated_delta_rule"),
                "kda": Named("subquad.ops:kda"),
            },
            "mixers": {
                "delta_net": Named("subquad.mixers.delta_net:DeltaNet"),
                "gated_delta_net": Named("subquad.mixers.delta_net:GatedDeltaNet"),
            },
        },
        patterns=(CAUSAL_SELF,),
        backends=ALL_BACKENDS,
        state="built",
    ),
    System(
        11,
        "lasp2",
        "LASP-2",
        "Rethinking Sequence Parallelism for Linear Attention and Its Hybrid",
        "distributed training",
    ),
    System(
        12,
        "dsf",
        "DSF",
        "Understanding the differences in Foundation Models (the Dynamical Systems Framework)",
        "system analysis, mixer",
        names={
            "mixers": {
                "normalized_attention": Named("subquad.mixers.normalized_attention:NormalizedAttention"),
                "qlstm": Named("subquad.mixers.qlstm:QLSTM"),
            },
        },
        patterns=(CAUSAL_SELF,),
        backends=ALL_BACKENDS,
        state="built",
    ),
    System(
        13,
        "kernelized_rpe",
        "NPRF with RPE",
        "Stable, Fast and Accurate: Kernelized Attention with Relative Positional Encoding",
        "op, mixer",
    ),
    System(14, "urpe", "URPE", "Your Transformer May Not be as Powerful as You Expect", "positions"),
    System(
        15,
        "lolcats",
        "LoLCATs",
        "On Low-Rank Linearizing of Large Language Models",
        "conversion, op, mixer",
        names={
            "ops": {
                "sliding_linear_attention": Named("subquad.ops:sliding_linear_attention"),
                "terraced_linear_attention": Named("subquad.ops:terraced_linear_attention"),
            },
            "mixers": {"lolcats": Named("subquad.mixers.lolcats:LolcatsAttention")},
        },
        patterns=(CAUSAL_SELF,),
        backends=ALL_BACKENDS,
        state="built",
    ),
    System(
        16,
        "mom",
        "MoM",
        "Linear Sequence Modeling with Mixture-of-Memories",
        "mixer",
        names={"mixers": {"mom": Named("subquad.mixers.mixture_of_memories:MixtureOfMemories")}},
        patterns=(CAUSAL_SELF,),
        backends=ALL_BACKENDS,
        state="built",
    ),
    System(
        17,
        "lina_speech",
        "Lina-Speech",
        "Gated Linear Attention is a Fast and Parameter-Efficient Learner for text-to-speech synthesis",
        "speech model, adaptation",
    ),
    System(
        18,
        "inline",
        "InLine",
        "Bridging the Divide: Reconsidering Softmax and Linear Attention",
        "mixer, vision model",
        names={
            "ops": {
                "injective_linear_attention": Named("subquad.ops:injective_linear_attention"),
                "dynamic_depthwise_conv": Named("subquad.ops:dynamic_depthwise_conv"),
            },
            "mixers": {"inline": Named("subquad.mixers.inline:InLineAttention")},
        },
        patterns=(FULL_SELF, FULL_CROSS),
        backends=TORCH_ONLY,
        state="built",
    ),
    System(
        19,
        "transnormer",
        "TransNormer",
        "The Devil in Linear Transformer",
        "mixers, language model",
        names={
            "mixers": {
                "norm_attention": Named("subquad.mixers.norm_attention:NormAttention"),
                "diag_attention": Named("subquad.mixers.norm_attention:DiagAttention"),
            },
        },
        patterns=(CAUSAL_SELF, FULL_SELF, CAUSAL_CROSS, FULL_CROSS),
        backends=ALL_BACKENDS,
        state="built",
    ),
    System(
        20,
        "reid",
        "Little-bit attention",
        "A Little Bit Attention Is All You Need for Person Re-Identification",
        "vision add-on, search",
    ),
    System(21, "rcmha", "RCMHA", "Relative Convolutional Multi-Head Attention for Natural Language Modelling", "mixer"),
    System(22, "longvq", "LongVQ", "Long Sequence Modeling with Vector Quantization on Structured Memory", "mixer"),
    System(
        23,
        "lit",
        "LiT",
        "Delving into a Simplified Linear Diffusion Transformer for Image Generation",
        "conversion, diffusion model",
    ),
    System(24, "sea", "SEA", "Sparse Linear Attention with Estimated Attention Mask", "mixer, conversion"),
    System(25, "cab", "CAB", "Comprehensive Attention Benchmarking on Long Sequence Modeling", "benchmark, mixers"),
    System(
        26,
        "liger",
        "Liger",
        "Linearizing Large Language Models to Gated Recurrent Structures",
        "conversion, mixer",
        names={"mixers": {"liger": Named("subquad.mixers.liger:LigerAttention")}},
        patterns=(CAUSAL_SELF,),
        backends=ALL_BACKENDS,
        state="built",
    ),
    System(
        27,
        "softplus",
        "LSSA / LSSAR",
        "Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models",
        "op, mixer",
    ),
    System(
        28,
        "transnormerllm",
        "TransNormerLLM",
        "Scaling TransNormer to 175 Billion Parameters",
        "language model",
        names={
            "feedforwards": {"sglu": Named("subquad.feedforward.glu:GatedFeedForward", {"activation": "identity"})},
            "norms": {"simple_rms": Named("subquad.layers.norms:SimpleRMSNorm")},
            "positions": {"lrpe": Named("subquad.positions.lrpe:LRPE")},
        },
        patterns=(CAUSAL_SELF,),
        backends=ALL_BACKENDS,
        state="built",
    ),
    System(
        29,
        "prosparse",
        "ProSparse",
        "Introducing and Enhancing Intrinsic Activation Sparsity within LLMs",
        "conversion, feed-forward",
        names={
            "ops": {
                "sparse_gated_feedforward": Named("subquad.ops:sparse_gated_feedforward"),
                "sparse_down_projection": Named("subquad.ops:sparse_down_projection"),
            },
            "feedforwards": {
                "reglu": Named("subquad.feedforward.glu:GatedFeedForward", {"activation": "relu"}),
                "fatreglu": Named(
                    "subquad.feedforward.glu:GatedFeedForward", {"activation": "relu", "threshold": 0.01}
                ),
            },
        },
        backends=("reference", "chunked", "cpu"),
        state="built",
    ),
    System(30, "gtrxl", "GTrXL", "Stabilizing Transformers for Reinforcement Learning", "policy model"),
    System(
        31,
        "aaren",
        "Aaren",
        "Attention as an RNN",
        "op, mixer",
        names={
            "ops": {"prefix_attention": Named("subquad.ops:prefix_attention")},
            "mixers": {"aaren": Named("subquad.mixers.aaren:Aaren")},
        },
        patterns=(CAUSAL_SELF,),
        backends=ALL_BACKENDS,
        state="built",
    ),
    System(32, "linfusion", "LinFusion", "1 GPU, 1 Minute, 16K Image", "conversion, mixer"),
    System(
        33,
        "sparsing_law",
        "Sparsing Law",
        "Towards Large Language Models with Greater Activation Sparsity",
        "measurement, feed-forward",
        names={
            "evaluation": {
                "perplexity_sparsity": Named("subquad.evaluation.sparsity:perplexity_sparsity"),
                "fit_sparsity_law": Named("subquad.evaluation.sparsity_law:fit_sparsity_law"),
            }
        },
        state="built",
    ),
    System(
        34,
        "neighborhood",
        "Neighborhood",
        "Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock Level",
        "op, mixer",
    ),
    System(
        35,
        "dcal",
        "DCAL",
        "Dual Cross-Attention Learning for Fine-Grained Categorization and Object Re-Identification",
        "vision training",
    ),
    System(
        36,
        "titans",
        "Titans",
        "Learning to Memorize at Test Time",
        "op, mixers",
        names={
            "ops": {
                "neural_memory": Named("subquad.ops:neural_memory"),
                "neural_memory_read": Named("subquad.ops:neural_memory_read"),
            },
            "mixers": {
                "neural_memory": Named("subquad.mixers.neural_memory:NeuralMemory"),
                "titans_mac": Named("subquad.mixers.titans:TitansMAC"),
                "titans_mag": Named("subquad.mixers.titans:TitansMAG"),
                "titans_mal": Named("subquad.mixers.titans:TitansMAL"),
            },
        },
        patterns=(CAUSAL_SELF,),
        backends=TORCH_ONLY,
        state="built",
    ),
    System(
        37,
        "sigmareparam",
        "sigmaReparam",
        "Stabilizing Transformer Training by Preventing Attention Entropy Collapse",
        "training",
    ),
    System(
        38,
        "rectification",
        "Rectification",
        "Systematic Rectification of Language Models via Dead-end Analysis",
        "decoding",
        names={
            "inference": {
                "rectify_logits": Named("subquad.inference.rectify:RectifyLogits"),
                "dead_end_value": Named("subquad.inference.dead_end_value:DeadEndValue"),
            }
        },
        state="built",
    ),
    System(
        39,
        "shiftaddvit",
        "ShiftAddViT",
        "Mixture of Multiplication Primitives Towards Efficient Vision Transformer",
        "conversion, vision model",
    ),
    System(
        40,
        "recycled",
        "Recycled Attention",
        "Efficient inference for long-context language models",
        "decoding",
        names={"inference": {"recycle": Named("subquad.inference.recycled:recycle")}},
        patterns=(CAUSAL_SELF,),
        state="built",
    ),
    System(
        41,
        "sigmoid",
        "Sigmoid attention",
        "Theory, Analysis, and Best Practices for Sigmoid Self-Attention",
        "op, mixer",
    ),
    System(
        42,
        "hip",
        "HiP",
        "Sparse Sub-Quadratic Attention with Hierarchical Attention Pruning",
        "op, decoding",
        names={
            "ops": {
                "hip_attention": Named("subquad.ops:hip_attention"),
                "hip_mask": Named("subquad.ops:hip_mask"),
                "block_sparse_attention": Named("subquad.ops:block_sparse_attention"),
            },
            "inference": {"hip": Named("subquad.inference.hip_attention:hip")},
        },
        patterns=(CAUSAL_SELF, FULL_SELF, FULL_CROSS),
        backends=("reference", "chunked", "cpu"),
        state="built",
    ),
    System(
        43,
        "vig",
        "ViG",
        "Linear-complexity Visual Sequence Learning with Gated Linear Attention",
        "op, mixer, vision model",
    ),
    System(
        44,
        "p_adapter",
        "p-adapter",
        "p-Laplacian Adaptation for Generative Pre-trained Vision-Language Models",
        "adapter",
    ),
    System(
        45,
        "chatrex",
        "ChatRex",
        "Taming Multimodal LLM for Joint Perception and Understanding",
        "multimodal model",
    ),
    System(
        46,
        "mamba",
        "Mamba",
        "Linear-Time Sequence Modeling with Selective State Spaces",
        "op, mixer",
        names={
            "ops": {
                "selective_scan": Named("subquad.ops:selective_scan"),
                "diagonal_scan": Named("subquad.ops:diagonal_scan"),
            },
            "mixers": {"mamba": Named("subquad.mixers.mamba:Mamba")},
        },
        patterns=(CAUSAL_SELF,),
        backends=ALL_BACKENDS,
        state="built",
    ),
    System(47, "van", "VAN", "Visual Attention Network (large kernel attention)", "mixer, vision model"),
    System(
        48,
        "polycom",
        "PolyCom",
        "Polynomial Composition Activations: Unleashing the Dynamics of Large Language Models",
        "feed-forward",
    ),
    System(
        49,
        "clear",
        "CLEAR",
        "Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up",
        "conversion, mixer",
    ),
    System(
        50,
        "dependencyvit",
        "DependencyViT",
        "Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention",
        "mixer, vision model",
    ),
    System(
        51,
        "tcnca",
        "TCNCA",
        "Temporal Convolution Network with Chunked Attention for Scalable Sequence Processing",
        "mixer",
    ),
    System(
        52,
        "activator",
        "Activator",
        "GLU Activations as the Core Functions of a Vision Transformer",
        "feed-forward, vision model",
    ),
    System(
        53,
        "flowformer",
        "Flowformer",
        "Linearizing Transformers with Conservation Flows",
        "op, mixer",
        names={
            "ops": {"flow_attention": Named("subquad.ops:flow_attention")},
            "mixers": {"flow": Named("subquad.mixers.flow:FlowAttention")},
        },
        patterns=(CAUSAL_SELF, FULL_SELF, FULL_CROSS),
        backends=ALL_BACKENDS,
        state="built",
    ),
    System(
        54,
        "hyperzzw",
        "HyperZZW",
        "HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction",
        "mixer, vision model",
    ),
    System(
        55,
        "rwkv_sam",
        "RWKV-SAM",
        "Mamba or RWKV: Exploring High-Quality and High-Efficiency Segment Anything Model",
        "mixer, vision model",
    ),
    System(
        56,
        "lite_llm4rec",
        "Lite-LLM4Rec",
        "Rethinking Large Language Model Architectures for Sequential Recommendations",
        "recommendation model",
    ),
    System(57, "lamb", "LAMB", "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", "optimizer"),
    System(
        58,
        "jrt",
        "JRT",
        "Just read twice, closing the recall gap for recurrent language models",
        "op, mixer, training",
        names={
            "ops": {"prefix_linear_attention": Named("subquad.ops:prefix_linear_attention")},
            "mixers": {"jrt": Named("subquad.mixers.prefix:PrefixLinearAttention")},
        },
        patterns=(CAUSAL_SELF, FULL_SELF, PREFIX_SELF),
        backends=ALL_BACKENDS,
        state="built",
    ),
    System(
        59,
        "ee_mllm",
        "EE-MLLM",
        "A Data-Efficient and Compute-Efficient Multimodal Large Language Model",
        "multimodal model",
    ),
    System(
        60,
        "lrcn",
        "LRCN",
        "Long-term Recurrent Convolutional Networks for Visual Recognition and Description",
        "video model",
    ),
    System(61, "wings", "Wings", "Learning Multimodal LLMs without Text-only Forgetting", "multimodal model"),
    System(
        62,
        "tc_llava",
        "TC-LLaVA",
        "Rethinking the Transfer from Image to Video Understanding with Temporal Considerations",
        "positions, video model",
    ),
    System(
        63,
        "yopo",
        "YOPO",
        "Treat Visual Tokens as Text? But Your MLLM Only Needs Fewer Efforts to See",
        "multimodal compression",
    ),
    System(
        64,
        "negative_eigenvalues",
        "Negative eigenvalues",
        "Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues",
        "mixer option",
        names={
            "ops": {"delta_product": Named("subquad.ops:delta_product")},
            "mixers": {"delta_product": Named("subquad.mixers.delta_net:DeltaProduct")},
        },
        patterns=(CAUSAL_SELF,),
        backends=ALL_BACKENDS,
        state="built",
    ),
    System(
        65,
        "slab",
        "SLAB",
        "Simplified Linear Attention and Progressive Re-parameterized Batch Normalization",
        "norm, mixer",
    ),
    System(
        66,
        "rnn_sparsity",
        "RNN sparsity",
        "Investigating Sparsity in Recurrent Neural Networks",
        "compression, measurement",
    ),
    System(67, "soft", "SOFT", "Softmax-free Linear Transformers", "op, mixer, vision model"),
    System(
        68,
        "rnn_review",
        "RNN review",
        "A Critical Review of Recurrent Neural Networks for Sequence Learning",
        "mixers, seq2seq model, training",
        names={
            "mixers": {
                "elman": Named("subquad.mixers.recurrent_networks:Elman"),
                "jordan": Named("subquad.mixers.recurrent_networks:Jordan"),
                "lstm": Named("subquad.mixers.recurrent_networks:LSTM"),
                "gru": Named("subquad.mixers.recurrent_networks:GRU"),
                "echo_state": Named("subquad.mixers.recurrent_networks:EchoState"),
            },
        },
        patterns=(CAUSAL_SELF,),
        state="built",
    ),
    System(
        69,
        "fastervlm",
        "FasterVLM",
        "[CLS] Attention is All You Need for Training-Free Visual Token Pruning",
        "decoding",
    ),
    System(
        70,
        "halonet",
        "HaloNet",
        "Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
        "op, mixer, vision model",
    ),
)

ROWS = FOUNDATIONS + SYSTEMS


def _table(floor: str) -> dict[str, Named]:
    return {name: entry for row in ROWS for name, entry in row.names.get(floor, {}).items()}


OPS, MIXERS, FEEDFORWARDS, POSITIONS = (_table(floor) for floor in ("ops", "mixers", "feedforwards", "positions"))


def row_of(name: str) -> System | None:
    """The row that a number, slug, short name or public name stands for; None where there is none."""
    wanted = str(name).strip().lower()
    for row in ROWS:
        public = {public for table in row.names.values() for public in table}
        number = {str(row.number), f"{row.number:02d}"} if row.number is not None else set()
        if wanted in {row.slug, row.name.lower(), *public, *number}:
            return row
    return None
