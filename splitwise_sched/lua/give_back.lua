-- give_back: an instance cannot go on with a run. Its front end puts the request back, or it ends as failed.
--   KEYS     request:<id>, queue, deadlines, counters
--   ARGV[2]  request id      [3] epoch      [4] instance      [5] why      [6] "retry" | "fail"      [7] ms of retention
--   returns  1 | 0: this run was over already, or is no longer this instance's

local id, r = ARGV[2], load(ARGV[2])
if not r or r.epoch ~= ARGV[3] or not (r.state == 'queued' or is_with(ARGV[4], r)) then return 0 end
if ARGV[6] == 'retry' then
  lose(id, r, ARGV[4], ARGV[5])
else
  terminate(id, r, 'failed', ARGV[5], tonumber(ARGV[7]))
end
return 1
