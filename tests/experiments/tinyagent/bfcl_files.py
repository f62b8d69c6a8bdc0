"""A question in the layout of BFCL's, with its answer in it."""

PLAY = {
    "id": "parallel_0",
    "question": [[{"role": "user", "content": "Play A and B."}]],
    "function": [
        {
            "name": "music.play",
            "description": "Play something.",
            "parameters": {
                "type": "dict",
                "required": ["artist", "minutes"],
                "properties": {
                    "artist": {"type": "string", "description": "Who."},
                    "minutes": {"type": "integer", "description": "How long."},
                    "loud": {
                        "type": "boolean",
                        "description": "If so.",
                        "default": False,
                    },
                },
            },
        }
    ],
    "ground_truth": [
        {"music.play": {"artist": ["A", "The A"], "minutes": [20]}},
        {"music.play": {"artist": ["B"], "minutes": [15, ""], "loud": [True]}},
    ],
}
