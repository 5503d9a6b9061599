"""An HTTP API that makes images: `mrflow serve`.

One model is loaded once, and one thread samples; whoever asks waits in a queue of limited length. What is asked for is
checked before it waits, so that a refusal comes at once. The command line builds what is served (`served.Served`).
"""
