"""One server in virtual time, many generations, and the rules by which it could divide its time and its pages.

`python -m shoal.simulator.serving` compares rules by how long generations take. The model:

* **A job is a whole generation** of a remote client: a prompt, then one token after another. The server does not know
  how long the answer will be, only how many tokens the client allows. A step arrives alone, and the next one only after
  its answer has gone around the rest of the ring: after the job's `away_seconds`, which vary from step to step.
* **A pass takes** `base + token · (new tokens) + attention · (pairs of a new token and a token that it sees)` seconds.
  The defaults are about those of 8 blocks of the reference model (1.1 B parameters, 16 layers, bfloat16) on two cores
  of an EPYC: reading the weights takes 50 ms, and a token 1.5 ms more.
* **The cache has pages** of 16 tokens. They are taken as sessions grow. The full pages of a session that lost or left
  them are found again by its client as long as no other session was given them (the prefix cache).
* **Prompts are computed in chunks**, as many tokens a pass as the live engine takes, or whole where a rule says so.
* **To preempt is to take pages.** The server does not have the inputs, the client has: it is refused, comes back after
  two seconds, and sends in one step what the server lacks. So a session that is preempted is computed again.
* A step that waits for pages for 20 s is refused too, as is one that finds 64 others waiting (`Limits`).

The simulated server's loop does what `shoal.server.engine.loop` does, with the same functions of `shoal.policy`: when
passes begin, how long they wait for sessions that are expected, how much of prompts they take. A test compares the two,
pass by pass. Training, several sequences in a session and several servers on one machine are left out.

It imports `shoal.policy.batching` and the ground, and nothing else of the simulator.
"""
