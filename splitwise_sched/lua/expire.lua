-- expire: end requests whose deadline has passed, and spill those that have waited for their preferred instance.
--   KEYS     deadlines, queue, counters
--   ARGV[2]  requests at most      [3] ms of retention
--   returns  how many were looked at

local ids = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now_ms(), 'LIMIT', 0, tonumber(ARGV[2]))
for _, id in ipairs(ids) do
  local r = load(id)
  if r and is_live(r.state) then
    terminate(id, r, 'expired', 'it did not end before its deadline; it was ' .. r.state, tonumber(ARGV[3]))
  else
    redis.call('ZREM', KEYS[1], id)
  end
end
spill_due(tonumber(ARGV[2]))
return #ids
