-- orphans: cancel the requests of a front end whose lease has lapsed, a bounded number a call.
--   KEYS     frontend:<id>, frontends, out:<id>, deadlines, counters
--   ARGV[2]  front end      [3] requests to look at, about      [4] "0", or where the call before left off
--   ARGV[5]  ms of retention   [6] requests cancelled since "0"
--   returns  {requests cancelled, where to look on; "0": all is looked through, or it has its lease again}
-- Which requests are whose is written down with each alone: a front end's death is rare, and may cost a look at all.
-- It is forgotten when a look at all of them found none: where one left off means nothing to a server that has taken over.

local me = ARGV[2]
if redis.call('EXISTS', KEYS[1]) == 1 then return {0, '0'} end
redis.call('UNLINK', KEYS[3])
local page = redis.call('ZSCAN', KEYS[4], ARGV[4], 'COUNT', tonumber(ARGV[3]))
local num_cancelled = 0
for i = 1, #page[2], 2 do
  local id = page[2][i]
  if redis.call('HGET', P .. 'request:' .. id, 'frontend') == me then
    local r = load(id)
    if is_live(r.state) then
      terminate(id, r, 'cancelled', 'the lease of its front end ' .. me .. ' has lapsed', tonumber(ARGV[5]))
      -- By this the front end may have it back, should it only have slept.
      redis.call('HSET', P .. 'request:' .. id, 'orphaned', 1)
      num_cancelled = num_cancelled + 1
    end
  end
end
if num_cancelled > 0 then count('orphaned', num_cancelled) end
local is_clean = page[1] == '0' and num_cancelled + tonumber(ARGV[6]) == 0
if is_clean then redis.call('ZREM', KEYS[2], me) end
return {num_cancelled, page[1]}
