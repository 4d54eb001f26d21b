-- lapsed: what there is to sweep: whose lease has lapsed, and whether somebody's time is over.
--   KEYS     instances, queue, frontends, deadlines
--   ARGV[2]  front ends at most
--   returns  {instances, of those registered and of the queue's consumers (zombies that woke); front ends;
--            1 when expire.lua has something to do}

local dead, seen = {}, {}
local function look_at(instance)
  if seen[instance] then return end
  seen[instance] = true
  if redis.call('EXISTS', P .. 'instance:' .. instance) == 0 then dead[#dead + 1] = instance end
end

for _, instance in ipairs(redis.call('SMEMBERS', KEYS[1])) do look_at(instance) end
local consumers = redis.pcall('XINFO', 'CONSUMERS', KEYS[2], 'prefill')
-- Without a queue there are none: the first instance makes it.
if not consumers.err then
  for _, consumer in ipairs(consumers) do
    for i = 1, #consumer, 2 do
      if consumer[i] == 'name' then look_at(consumer[i + 1]) end
    end
  end
end
local now = now_ms()

local function is_due(key)
  local first = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')
  return first[2] ~= nil and tonumber(first[2]) <= now
end

return {dead, redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now, 'LIMIT', 0, tonumber(ARGV[2])),
        (is_due(KEYS[4]) or is_due(P .. 'preferred')) and 1 or 0}
