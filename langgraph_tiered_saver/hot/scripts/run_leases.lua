-- Let a shard know the run leases that PostgreSQL records, and no other one.
-- KEYS: shard
-- ARGV: generation, who opens it, then thread, token and microseconds left of each lease...
-- Returns how many they are.
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
local generation = redis.call('HGET', KEYS[1], 'g')
if generation ~= ARGV[1] then
  return redis.error_reply('TIEREDGENERATION the generation here is ' .. (generation or 'unknown'))
end
-- Leases that were taken since another process opened it are not in the list.
if redis.call('HGET', KEYS[1], 'o:' .. ARGV[2]) ~= ARGV[1] then
  return redis.error_reply('TIEREDGENERATION another process has opened it')
end
local stale, fields, count = {}, {}, 0
for _, name in ipairs(redis.call('HKEYS', KEYS[1])) do
  if string.sub(name, 1, 2) == 'f:' then stale[#stale + 1] = name end
end
in_chunks('HDEL', KEYS[1], stale)
for i = 3, #ARGV, 3 do
  fields[count + 1] = 'f:' .. ARGV[i]
  fields[count + 2] = ARGV[i + 1] .. ' ' .. string.format('%.0f', now + tonumber(ARGV[i + 2]))
  count = count + 2
end
in_chunks('HSET', KEYS[1], fields)
return count / 2
