-- cancel: end a request wherever it is; both its instances are told.
--   KEYS     request:<id>, queue, deadlines, counters
--   ARGV[2]  request id      [3] why      [4] ms of retention      [5] "cancelled" | "expired"
--   returns  {1, the state that it was in} | {0, the state in which it had ended, or ""}

local r = load(ARGV[2])
if not r then return {0, ''} end
if not is_live(r.state) then return {0, r.state} end
terminate(ARGV[2], r, ARGV[5], ARGV[3], tonumber(ARGV[4]))
return {1, r.state}
